"""The output of a batch file: a line for each of the input, in the order in which they were done, each written whole.

The `id` of a line says which one of the input it is of, and of which bytes. So a run that was interrupted, at any
moment, goes on where it was: what is there is known from the file itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import orjson

from bdh_batch.errors import ConfigError
from bdh_batch.shell.batch_input import BadLine, Line
from bdh_batch.shell.in_process_app import Response

PREFIX = b'{"id":"batch_req_'
ID = re.compile(r"batch_req_([0-9]{1,12})_([0-9a-f]{8})")
MOST_LINE = 2**30  # bytes: no response is so long
FINE = 200


class BatchOutput:
    """The file that responses are written to.

    Args:
        path: a file, which may have lines of a run that was interrupted.
        digests: of each line of the input, by its number.

    Raises:
        ConfigError: it cannot be written, another run has it, or it is of something else.
    """

    def __init__(self, path: Path, digests: Sequence[int]) -> None:
        self._path = path
        self._digests = digests
        self._there = bytearray(len(digests))  # for each line of the input: whether its output is
        self.lines = self.failed = 0
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise ConfigError(f"-o: {path} cannot be written: {error.strerror}") from error
        try:
            self._lock()
            self._recover()
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def has(self, line: Line) -> bool:
        """Whether the output of a line is there."""
        return bool(self._there[line.number])

    def respond(self, line: Line, custom_id: str, response: Response) -> None:
        """Writes what a line's request got. Raises OSError."""
        body = response.body
        if b"\n" in body:  # a line has none
            body = orjson.dumps(orjson.loads(body))
        head = orjson.dumps({"status_code": response.status, "request_id": response.request_id})[:-1]
        members = (orjson.dumps(_id(line)), orjson.dumps(custom_id), head, body)
        self._write(b'{"id":%b,"custom_id":%b,"response":%b,"body":%b},"error":null}\n' % members)
        self._count(line.number, line.digest, response.status == FINE)

    def refuse(self, line: Line, error: BadLine) -> None:
        """Writes what is wrong with a line. Raises OSError."""
        shown = {"code": error.code, "message": error.message, "param": error.param, "line": line.number}
        values = {"id": _id(line), "custom_id": error.custom_id, "response": None, "error": shown}
        self._write(orjson.dumps(values) + b"\n")
        self._count(line.number, line.digest, fine=False)

    def close(self) -> None:
        """Has what was written be on the disk. To be called once. Raises OSError."""
        try:
            os.fsync(self._file)
        finally:
            os.close(self._file)

    def _write(self, line: bytes) -> None:
        """All of it, or the file ends with a part of it, to which nothing more is added."""
        left = memoryview(line)
        while left:
            left = left[os.write(self._file, left) :]

    def _lock(self) -> None:
        if not stat.S_ISREG(os.fstat(self._file).st_mode):
            raise ConfigError(f"-o: {self._path} is no regular file; a run that is interrupted goes on from it")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise ConfigError(f"-o: {self._path} is in use by another run") from error

    def _recover(self) -> None:
        """Learns what is there, and cuts off what was being written last."""
        end = 0
        for number, raw in enumerate(self._read(), 1):
            found = _parsed(raw)
            if found is None:
                is_last = end + len(raw) == os.fstat(self._file).st_size
                if not (is_last and _may_be_ours(raw)):
                    raise ConfigError(f"-o: {self._path}: line {number} is not one of run-batch; name another file")
                break
            end += len(raw)
            self._count(*found)
        os.ftruncate(self._file, end)
        os.lseek(self._file, end, os.SEEK_SET)

    def _read(self) -> Iterator[bytes]:
        with open(self._file, "rb", closefd=False) as file:
            while raw := file.readline(MOST_LINE):
                yield raw

    def _count(self, number: int, digest: int, fine: bool) -> None:
        if number >= len(self._digests) or self._digests[number] != digest:
            raise self._of_another(f"there, line {number} is another one")
        if self._there[number]:
            raise ConfigError(f"-o: {self._path} has the response to line {number} twice; name another file")
        self._there[number] = True
        self.lines += 1
        self.failed += not fine

    def _of_another(self, how: str) -> ConfigError:
        return ConfigError(f"-o: {self._path} is of another input: {how}; name another file, or remove it")


def _id(line: Line) -> str:
    return f"batch_req_{line.number}_{line.digest:08x}"


def _parsed(raw: bytes) -> tuple[int, int, bool] | None:
    """The number of the line of the input, its digest, and whether it went well; None of what is no whole line."""
    values: Any = None
    with contextlib.suppress(orjson.JSONDecodeError):
        values = orjson.loads(raw)
    if not raw.endswith(b"\n") or not isinstance(values, dict) or "response" not in values:
        return None
    found = ID.fullmatch(values["id"]) if isinstance(values.get("id"), str) else None
    if found is None:
        return None
    response = values["response"]
    return int(found[1]), int(found[2], 16), isinstance(response, dict) and response.get("status_code") == FINE


def _may_be_ours(raw: bytes) -> bool:
    """Whether it may be a part of a line, or what a file system leaves of one when the power fails."""
    return raw[: len(PREFIX)] == PREFIX[: len(raw)] or not raw.strip(b"\0\n")
