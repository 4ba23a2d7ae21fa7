"""A start where nothing is as on a developer's machine: nothing to write to, no home, no folder, few resources."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bdh_batch.system.machine import ROOT, Group, groups

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

HERE = Path(__file__).parent.parent
MIB = 2**20
LIMIT, USED = 1024, 624  # MiB of memory that the server's control group allows, and that it has in use
INACTIVE = 200  # MiB of those in use that are page cache

# In mounts of its own: the groups are those of the test, and nothing of the disk can be written. Then another root, an
# empty environment, no home, no input, and a folder that is gone.
POOR = """
set -e
root=$1 ours=$2
shift 2
mount --make-rprivate /
for each in memory cpu; do
    if test -e "$ours/$each"; then mount --bind "$ours/$each" "$(cat "$ours/$each.at")"; fi
done
mount --rbind / "$root"
awk -v root="$root" '$5 ~ "^" root && $5 !~ "^" root "/(proc|sys|dev)(/|$)" {print $5}' /proc/self/mountinfo |
    while read -r folder; do mount -o remount,ro,bind "$folder"; done
exec chroot "$root" /bin/sh -c '
    gone=$(mktemp -d -p /dev/shm) && cd "$gone" && rmdir "$gone" && exec env -i PYTHONPATH="$0" "$@" <&-
' "$@"
"""


def limited(folder: Path, controller: str, group: Group) -> None:
    """Files of a control group as the kernel would write them."""
    made = folder / controller
    made.mkdir(parents=True)
    (folder / f"{controller}.at").write_text(str(group.folder))
    cache = "inactive_file" if group.version == 2 else "total_inactive_file"
    sizes = {"memory.stat": f"{cache} {INACTIVE * MIB}"}
    sizes |= dict.fromkeys(["memory.max", "memory.limit_in_bytes"], str(LIMIT * MIB))
    sizes |= dict.fromkeys(["memory.current", "memory.usage_in_bytes"], str(USED * MIB))
    quota = {"cpu.max": "70000 100000", "cpu.cfs_quota_us": "70000", "cpu.cfs_period_us": "100000"}
    for name, text in (sizes if controller == "memory" else quota).items():
        (made / name).write_text(text)


def can_make_mounts(folder: Path) -> bool:
    command = ["unshare", "-m", "sh", "-c", f"mount --make-rprivate / && mount --rbind / {folder}"]
    try:
        return subprocess.run(command, capture_output=True, timeout=300).returncode == 0
    except FileNotFoundError:
        return False


@pytest.fixture(scope="module")
def poor(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root, ours = tmp_path_factory.mktemp("root"), tmp_path_factory.mktemp("groups")
    if not can_make_mounts(root):
        pytest.skip("needs the right to mount, as root has it")
    for controller in ("memory", "cpu"):
        for group in list(groups(ROOT, controller))[:1]:
            limited(ours, controller, group)
    inside = ["unshare", "-m", "sh", "-c", POOR, "sh", root, ours, HERE]
    with serve("engine.kernels=torch", inside=inside) as server:
        yield server


def test_it_serves(poor: Server) -> None:
    assert poor.complete(prompt="ROMEO:\n", max_tokens=3)["usage"]["completion_tokens"] == 3
    chat = poor.http.post(
        "/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 3}
    )
    assert chat.status_code == 200


def test_it_reports_once_that_kernels_are_not_kept(poor: Server) -> None:
    warnings = [line for line in poor.log.splitlines() if " WARNING " in line]
    assert len(warnings) == 1
    assert "compiled CPU kernels are not kept" in warnings[0]
    assert "NUMBA_CACHE_DIR" in warnings[0]


@pytest.mark.skipif(not list(groups(ROOT, "memory")), reason="this machine has no control groups for memory")
def test_its_states_take_half_of_what_its_group_leaves(poor: Server) -> None:
    found = re.search(r"of a budget of ([0-9.]+) GiB", poor.log)
    assert found is not None
    free = LIMIT - (USED - INACTIVE)
    assert float(found[1]) * 1024 <= free / 2 + 10


@pytest.mark.skipif(not list(groups(ROOT, "cpu")), reason="this machine has no control groups for processors")
def test_it_computes_with_the_threads_that_its_quota_gives_time_for(poor: Server) -> None:
    assert "threads: 1 of 1 usable cores" in poor.log


def test_nothing_was_written(poor: Server) -> None:
    assert not [name for name in os.listdir("/dev/shm") if name.startswith("tmp.")]
