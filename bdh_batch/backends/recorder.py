"""Records which requests an engine's current step contains, so that front ends can read it after a crash.

The record is written to memory that is mapped to a file, before each step. That costs no system call, and the file
outlives the process.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Collection
from pathlib import Path

from bdh_batch.scheduler.batch import Step

SIZE = 2**16
LENGTH = struct.Struct("<I")


class StepRecorder:
    """Records those requests of a step that have no token of this engine yet: only they may be what crashes it.

    It is called in the engine's thread.

    Args:
        file: is overwritten.
    """

    def __init__(self, file: Path) -> None:
        file.unlink(missing_ok=True)
        file.write_bytes(bytes(SIZE))
        with file.open("r+b") as opened:
            self._memory = mmap.mmap(opened.fileno(), SIZE)
        self._empty = True

    def __call__(self, step: Step) -> None:
        names = {sequence.id for sequence in step.sequences if sequence.times.last_token is None}
        if not names and self._empty:
            return
        text = "\n".join(sorted(names)).encode()[: SIZE - LENGTH.size]
        self._memory[: LENGTH.size] = LENGTH.pack(0)
        self._memory[LENGTH.size : LENGTH.size + len(text)] = text
        self._memory[: LENGTH.size] = LENGTH.pack(len(text))
        self._empty = not names


def step_file(socket: Path) -> Path:
    """Returns the file in which the engine of that socket records its current step."""
    return socket.with_suffix(".step")


def recorded(file: Path) -> Collection[str]:
    """Returns the ids of the requests in an engine's record; none where there is no such file."""
    try:
        content = file.read_bytes()
    except OSError:
        return ()
    if len(content) < LENGTH.size:
        return ()
    (length,) = LENGTH.unpack_from(content)
    return frozenset(content[LENGTH.size : LENGTH.size + length].decode(errors="replace").split("\n")) - {""}
