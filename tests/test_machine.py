"""What a process may take of a machine: every kind of control group that there is, as files in a folder."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from bdh_batch.system.machine import ROOT, available_memory, groups, usable_cores

MIB = 2**20
SYSTEM = 8192  # MiB that all of the machine has
CORES = usable_cores()


class Tree:
    """A machine whose kernel has reported what is written here."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/meminfo", f"MemTotal: 16777216 kB\nMemFree: 1024 kB\nMemAvailable: {SYSTEM * 1024} kB\n")

    def write(self, name: str, content: str) -> None:
        file = self.root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)

    def belong(self, groups: str, *mounts: str) -> None:
        self.write("proc/self/cgroup", groups)
        self.write("proc/self/mountinfo", "22 27 0:21 / /proc rw - proc proc rw\n" + "\n".join(mounts) + "\n")

    def memory_2(self, group: str, limit: str, used: int, cache: int = 0, high: str = "max") -> None:
        """Sizes in MiB."""
        for name, text in {"max": limit, "high": high}.items():
            self.write(f"{group}/memory.{name}", f"{text if text == 'max' else int(text) * MIB}\n")
        self.write(f"{group}/memory.current", f"{used * MIB}\n")
        self.write(f"{group}/memory.stat", f"anon 5\nfile 7\ninactive_file {cache * MIB}\nactive_file 9\n")

    def memory_1(self, group: str, limit: int | None, used: int, cache: int = 0) -> None:
        self.write(f"{group}/memory.limit_in_bytes", str(9223372036854771712 if limit is None else limit * MIB))
        self.write(f"{group}/memory.usage_in_bytes", f"{used * MIB}\n")
        self.write(f"{group}/memory.stat", f"inactive_file 3\ntotal_inactive_file {cache * MIB}\n")

    @property
    def mib(self) -> float:
        return available_memory(self.root) / MIB


V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MEMORY = "35 31 0:32 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory"
V1_CPU = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct"
SYS = "sys/fs/cgroup"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_without_control_groups_the_whole_machine_counts(tree: Tree) -> None:
    assert tree.mib == SYSTEM
    assert usable_cores(tree.root) == CORES


def test_the_tightest_limit_on_the_way_up_counts(tree: Tree) -> None:
    tree.belong("0::/kube/pod/container\n", V2)
    tree.memory_2(f"{SYS}/kube/pod/container", "4096", used=1000)
    tree.memory_2(f"{SYS}/kube/pod", "2048", used=1500)
    tree.memory_2(f"{SYS}/kube", "max", used=7000)
    assert tree.mib == 548
    tree.memory_2(f"{SYS}/kube/pod", "max", used=1500, high="1600")
    assert tree.mib == 100
    tree.memory_2(f"{SYS}/kube/pod", "max", used=1500)
    assert tree.mib == 3096
    tree.memory_2(f"{SYS}/kube/pod/container", "max", used=1000)
    assert tree.mib == SYSTEM


def test_page_cache_that_can_be_given_back_is_not_used(tree: Tree) -> None:
    tree.belong("0::/\n", V2)
    tree.memory_2(SYS, "2048", used=2040, cache=1000)
    assert tree.mib == 1008
    tree.memory_2(SYS, "2048", used=3000)
    assert tree.mib == 0


def test_version_1_by_controller(tree: Tree) -> None:
    tree.belong("4:memory:/docker/abc\n3:cpu,cpuacct:/\n1:name=systemd:/docker/abc\n", V1_MEMORY, V1_CPU)
    tree.memory_1(f"{SYS}/memory/docker/abc", 1024, used=500, cache=100)
    tree.memory_1(f"{SYS}/memory", None, used=5000)
    assert tree.mib == 624
    tree.memory_1(f"{SYS}/memory/docker", 600, used=500)
    assert tree.mib == 100


def test_both_versions_at_once(tree: Tree) -> None:
    mount = "41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw"
    tree.belong("4:memory:/a\n0::/b\n", V1_MEMORY, mount)
    tree.memory_1(f"{SYS}/memory/a", 1024, used=0)
    assert tree.mib == 1024


@pytest.mark.parametrize("path", ["/docker/abc", "/../../other", "/elsewhere"])
def test_a_container_sees_its_own_group_as_the_top(tree: Tree, path: str) -> None:
    """What it is reported of its path may be the host's, or lead out of what it sees."""
    tree.belong(f"4:memory:{path}\n0::{path}\n", V1_MEMORY.replace(" / ", " /docker/abc ", 1), V2)
    tree.memory_1(f"{SYS}/memory", 512, used=12)
    assert tree.mib == 500


def test_a_folder_with_a_space_is_found(tree: Tree) -> None:
    tree.belong("0::/a\n", V2.replace("/sys/fs/cgroup", r"/sys/fs/my\040groups"))
    tree.memory_2("sys/fs/my groups/a", "512", used=0)
    assert tree.mib == 512


@pytest.mark.parametrize("content", ["", "max", "nonsense", "-1", "12 34 56", "\xff\xfe"])
def test_what_is_no_limit_is_none(tree: Tree, content: str) -> None:
    tree.belong(f"0::/a\n{content}\n", V2, content, f"{content} - {content}")
    for name in ("memory.max", "memory.high", "memory.current", "memory.stat", "cpu.max"):
        tree.write(f"{SYS}/a/{name}", content)
    assert tree.mib == SYSTEM
    assert usable_cores(tree.root) == CORES


@pytest.mark.parametrize(("quota", "cores"), [("50000", 1), ("100000", 1), ("max", CORES), ("99900000", CORES)])
def test_quotas_give_a_core_for_each_begun_one(tree: Tree, quota: str, cores: int) -> None:
    tree.belong("0::/pod/a\n", V2)
    tree.write(f"{SYS}/pod/cpu.max", f"{quota} 100000\n")
    tree.write(f"{SYS}/pod/a/cpu.max", "max 100000\n")
    assert usable_cores(tree.root) == cores
    tree.belong("3:cpu,cpuacct:/pod/a\n", V1_CPU)
    tree.write(f"{SYS}/cpu,cpuacct/pod/cpu.cfs_quota_us", "-1" if quota == "max" else quota)
    tree.write(f"{SYS}/cpu,cpuacct/pod/cpu.cfs_period_us", "100000")
    assert usable_cores(tree.root) == cores


@pytest.mark.skipif(CORES < 2, reason="with one core, no quota makes a difference in whole cores")
def test_a_core_that_is_begun_counts(tree: Tree) -> None:
    tree.belong("0::/\n", V2)
    tree.write(f"{SYS}/cpu.max", "110000 100000\n")
    assert usable_cores(tree.root) == 2


def limits(controller: str) -> dict[str, str]:
    """What a group of this machine has to be reported for 512 MiB, or half a core."""
    version = next(groups(ROOT, controller)).version
    if controller == "memory":
        return {"memory.max" if version == 2 else "memory.limit_in_bytes": str(512 * MIB)}
    if version == 2:
        return {"cpu.max": "50000 100000"}
    return {"cpu.cfs_period_us": "100000", "cpu.cfs_quota_us": "50000"}


@pytest.fixture(params=["memory", "cpu"])
def group(request: pytest.FixtureRequest) -> Iterator[tuple[str, Path]]:
    """A real group with a limit, where this machine lets one be made."""
    controller: str = request.param
    above = [each.folder for each in groups(ROOT, controller)]
    tops = {each.folder for each in groups(ROOT, controller) if each.folder.parent == Path("/sys/fs/cgroup")}
    if not above or above[0] not in tops | {Path("/sys/fs/cgroup")}:
        pytest.skip(f"the {controller} group that this runs in belongs to whoever made it, or there is none")
    folder = above[0] / f"bdh-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"no group can be made: {error}")
    try:
        for name, text in limits(controller).items():
            try:
                (folder / name).write_text(text)
            except OSError as error:
                pytest.skip(f"the group cannot be limited: {error}")
        yield controller, folder
    finally:
        folder.rmdir()


def test_a_real_group_is_seen(group: tuple[str, Path]) -> None:
    controller, folder = group
    code = (
        "from bdh_batch.system.machine import available_memory, usable_cores; print(available_memory(), usable_cores())"
    )
    script = 'echo $$ > "$0"/cgroup.procs && exec "$@"'
    command = ["sh", "-c", script, str(folder), sys.executable, "-c", code]
    memory, cores = map(int, subprocess.check_output(command, text=True, timeout=300).split())
    if controller == "memory":
        assert 0 < memory <= 512 * MIB
    else:
        assert cores == 1
