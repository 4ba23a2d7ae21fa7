"""What this process may take of the machine: memory and cores, as the kernel and its control groups limit them.

A container's limits are those of its control groups, version 1 or 2, and of every group above its own that can be seen:
the tightest counts. Knows nothing about what the memory is for.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

ROOT = Path("/")
UNLIMITED = 1 << 62  # bytes; version 1 writes a number of this size where there is no limit


def available_memory(root: Path = ROOT) -> int:
    """Bytes that could be taken now, without the kernel or a control group having to refuse them.

    Args:
        root: where /proc and the control groups are looked for.
    """
    return max(0, min([_system_memory(root), *_headrooms(root)]))


def usable_cores(root: Path = ROOT) -> int:
    """Cores that threads can keep busy: those that this process may run on, or fewer where a quota gives less time."""
    quotas = [math.ceil(quota) for quota in _quotas(root)]
    return max(1, min([len(cores()), *quotas]))


def cores() -> Sequence[int]:
    """The numbers of the cores that this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)


def _system_memory(root: Path) -> int:
    fields = _fields(root / "proc/meminfo")
    if "MemAvailable" in fields:
        return fields["MemAvailable"] * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")  # not Linux: what POSIX reports


def _headrooms(root: Path) -> Iterator[int]:
    """What each group's limit leaves. Page cache that the kernel would give back is not counted as used."""
    for group in groups(root, "memory"):
        names = ("memory.max", "memory.high") if group.version == 2 else ("memory.limit_in_bytes",)
        limit = min((_number(group.folder / name) for name in names), default=UNLIMITED)
        if limit >= UNLIMITED:
            continue
        usage, cache = (
            ("memory.current", "inactive_file")
            if group.version == 2
            else ("memory.usage_in_bytes", "total_inactive_file")
        )
        reclaimable = _fields(group.folder / "memory.stat").get(cache, 0)
        yield limit - max(0, _number(group.folder / usage, otherwise=0) - reclaimable)


def _quotas(root: Path) -> Iterator[float]:
    """The cores' worth of time that each group may use."""
    for group in groups(root, "cpu"):
        if group.version == 2:
            quota, _, period = _read(group.folder / "cpu.max").partition(" ")
        else:
            quota, period = (_read(group.folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdecimal() and period.isdecimal() and int(period):  # "max" and -1 are none
            yield int(quota) / int(period)


@dataclass(frozen=True, slots=True)
class Group:
    """A control group that this process is in."""

    version: int
    folder: Path


def groups(root: Path, controller: str) -> Iterator[Group]:
    """The process's own groups with this controller, each followed by those above it that can be seen."""
    mounts = list(_mounts(root, controller))
    for line in _read(root / "proc/self/cgroup").splitlines():
        hierarchy, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        version = 2 if hierarchy == "0" and not controllers else 1
        if version == 1 and controller not in controllers.split(","):
            continue
        for mount in mounts:
            if mount.version == version:
                yield from _upwards(mount, PurePosixPath(path))


@dataclass(frozen=True, slots=True)
class Mount:
    """Where a hierarchy of groups can be seen: its group `top` is the folder `at`."""

    version: int
    top: PurePosixPath
    at: Path


def _mounts(root: Path, controller: str) -> Iterator[Mount]:
    """See proc_pid_mountinfo(5)."""
    for line in _read(root / "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, described = before.split(" "), after.split(" ")
        if len(fields) < 5 or len(described) < 3:
            continue
        top, at = PurePosixPath(_unescaped(fields[3])), root / _unescaped(fields[4]).lstrip("/")
        if described[0] == "cgroup2":
            yield Mount(2, top, at)
        elif described[0] == "cgroup" and controller in described[2].split(","):
            yield Mount(1, top, at)


def _upwards(mount: Mount, path: PurePosixPath) -> Iterator[Group]:
    """A container may see its own group as the top, though it is given the host's path: then only the top is there."""
    inside = path.is_relative_to(mount.top) and ".." not in path.parts
    relative = path.relative_to(mount.top) if inside else PurePosixPath()
    folder = mount.at / relative
    for group in (folder, *(folder.parents[index] for index in range(len(relative.parts)))):
        yield Group(mount.version, group)


def _unescaped(text: str) -> str:
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _fields(file: Path) -> dict[str, int]:
    """A file of lines `name value` or `name: value kB`."""
    lines = (line.split() for line in _read(file).splitlines())
    return {words[0].rstrip(":"): int(words[1]) for words in lines if len(words) > 1 and words[1].isdecimal()}


def _number(file: Path, otherwise: int = UNLIMITED) -> int:
    text = _read(file)
    return int(text) if text.isdecimal() else otherwise


def _read(file: Path) -> str:
    """Empty where there is no such file, or none that may be read: a limit that is not reported cannot be kept to."""
    try:
        return file.read_text("utf-8", "replace").strip()
    except OSError:
        return ""
