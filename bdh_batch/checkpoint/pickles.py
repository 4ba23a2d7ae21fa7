"""Looks through a file of `torch.save` before torch reads it, for what would cost more than the file's own size.

`torch.load(weights_only=True)` runs no code of a file, but follows it in everything else: it unpacks a gigabyte of
deflated zeros, makes a bytearray of any length that is asked for, and hashes tuples until the stack ends. So the file
is first looked at as bytes: the members of its zip, and the instructions of its pickle. Nothing is built of either.
"""

from __future__ import annotations

import io
import os
import pickletools
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import brief, shown
from bdh_batch.system.machine import available_memory

ZIP = b"PK\x03\x04"  # what torch itself tells a zip by
PICKLE = "data.pkl"
LARGEST_DIRECTORY = 8 * 2**20  # bytes; some 80,000 members. A BDH has six tensors, and twice that in its optimizer
LARGEST_PICKLE = 4 * 2**20  # bytes; of the six tensors, one thousand
MOST_TUPLES = 50_000  # as many inside one another can be hashed without the stack's end
LEGACY_PICKLES = 5  # of a file before torch 1.6: a magic number, a version, the machine, the state dict, its storages
MATERIALIZE = frozenset(  # what torch allows a file to call, and what makes memory of a number in it
    {
        *("bytearray", "_rebuild_device_tensor_from_cpu_tensor", "_rebuild_device_tensor_from_numpy"),
        *("_rebuild_nested_tensor", "_rebuild_from_type_v2", "_rebuild_wrapper_subclass", "_rebuild_qtensor"),
    }
)


def is_zip(file: Path) -> bool:
    with file.open("rb") as stream:
        return stream.read(len(ZIP)) == ZIP


def check_torch_file(file: Path) -> None:
    """
    Raises:
        CheckpointError: loading it would take more than it is worth; the message names the file.
    """
    try:
        if is_zip(file):
            _check_zip(file)
        else:
            _check_legacy(file)
    except (zipfile.BadZipFile, ValueError, EOFError, NotImplementedError) as error:
        raise CheckpointError(f"{file}: damaged, or not a torch file ({shown(brief(error))})") from error


def refuse_pickled(file: Path, name: str) -> CheckpointError:
    path = f'"{shown(file.name)}"'
    return CheckpointError(
        f"{file}: holds pickled objects besides tensors ({shown(name)}), which are not loaded because they can run "
        "code, or take any amount of memory. Where you trust the file, two lines convert it: "
        f'saved = torch.load({path}, weights_only=False); torch.save({{"model": saved["model"], "config": '
        f'vars(saved["config"])}}, {path}) (dataclasses.asdict where vars has not all of its fields)'
    )


class PlainObject:
    """Stands for an object of a pickle whose class is not imported: it takes fields, and nothing is run.

    Every strange name of a file gets a class of its own, derived from this one, whose `made` lists its objects.
    """

    name: str
    file: Path
    made: list[PlainObject]

    def __new__(cls, *arguments: object) -> PlainObject:
        if arguments:  # what only holds fields is made without any
            raise refuse_pickled(cls.file, cls.name)
        new = super().__new__(cls)
        cls.made.append(new)
        return new

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict) or not all(isinstance(key, str) and key.isidentifier() for key in state):
            raise refuse_pickled(type(self).file, type(self).name)
        if any(key.startswith("__") for key in state):
            raise refuse_pickled(type(self).file, type(self).name)
        self.__dict__.update(state)


def stand_in(file: Path, name: str, made: list[PlainObject]) -> type[PlainObject]:
    """A class that stands for the class `name` in a pickle."""
    return type("StandIn", (PlainObject,), {"name": name, "file": file, "made": made})


class BoundedFile(io.FileIO):
    """A file of which only so much can be read as its zip's directory should have, until `left` is set to None."""

    left: int | None = LARGEST_DIRECTORY

    def read(self, size: int | None = -1, /) -> bytes:
        if self.left is None:
            return super().read(-1 if size is None else size) or b""
        if size is None or size < 0:
            size = os.fstat(self.fileno()).st_size - self.tell()
        if size > self.left:
            raise zipfile.BadZipFile("its directory is too large")
        self.left -= size
        return super().read(size) or b""


def _check_zip(file: Path) -> None:
    size = file.stat().st_size
    with BoundedFile(file) as stream, zipfile.ZipFile(stream) as archive:
        members = archive.infolist()
        if packed := [member.filename for member in members if member.compress_type != zipfile.ZIP_STORED]:
            raise CheckpointError(f"{file}: {brief(packed[0])} in it is compressed, which torch.save never does")
        # Both hold of what torch writes, and leave one way only to read a directory.
        if archive.comment or min((member.header_offset for member in members), default=1):
            raise zipfile.BadZipFile("something else lies before its members, or after them")
        if sum(member.file_size for member in members) > size:
            raise zipfile.BadZipFile("its members are larger than the file")
        for member in members:
            if "/data/" not in member.filename and member.file_size > LARGEST_PICKLE:
                raise _too_large(file, member.filename)
        pickles = [member for member in members if member.filename.rpartition("/")[2] == PICKLE]
    for member in pickles:
        with zipfile.ZipFile(file) as archive:
            _check_pickle(io.BytesIO(archive.read(member)), file)


def _check_legacy(file: Path) -> None:
    """Such a file cannot be mapped: it is read as a whole."""
    size, free = file.stat().st_size, available_memory()
    if size > free:
        text = f"of {size:,} bytes in torch's format before 1.6 is read as a whole, and {free:,} bytes are free"
        raise CheckpointError(f"{file}: {text}; save it anew with torch.save")
    with file.open("rb") as opened:
        stream = io.BytesIO(opened.read(LARGEST_PICKLE))
    try:
        for _ in range(LEGACY_PICKLES):
            _check_pickle(stream, file)
    except (ValueError, EOFError) as error:
        if size > LARGEST_PICKLE and stream.tell() == LARGEST_PICKLE:
            raise _too_large(file, "its pickle") from error
        raise


def _check_pickle(stream: io.BytesIO, file: Path) -> None:
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):  # of strings with wrong escapes
        _check_instructions(stream, file)


def _check_instructions(stream: io.BytesIO, file: Path) -> None:
    tuples = 0
    for name, argument in _instructions(stream):
        if name == "GLOBAL" and argument.rpartition(" ")[2] in MATERIALIZE:
            raise refuse_pickled(file, argument.replace(" ", "."))
        tuples += name.startswith("TUPLE")
        if tuples > MOST_TUPLES:
            raise CheckpointError(f"{file}: holds more than {MOST_TUPLES:,} tuples, which no state dict needs")


def _instructions(stream: io.BytesIO) -> Iterator[tuple[str, Any]]:
    for instruction, argument, _ in pickletools.genops(stream):
        yield instruction.name, argument


def _too_large(file: Path, name: str) -> CheckpointError:
    return CheckpointError(
        f"{file}: {brief(name)} in it is larger than {LARGEST_PICKLE:,} bytes, more than a BDH needs"
    )
