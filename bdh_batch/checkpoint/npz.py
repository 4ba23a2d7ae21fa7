"""Reads `.npz` files, as MLX and NumPy write them, into tensors.

Such a file is a zip of arrays, and may be compressed: what it claims is looked at before anything is unpacked. Arrays
of objects are pickles, and are refused.
"""

from __future__ import annotations

import math
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from bdh_batch.checkpoint.pickles import BoundedFile
from bdh_batch.errors import CheckpointError
from bdh_batch.system.documents import brief, listed, shown
from bdh_batch.system.machine import available_memory

SUFFIX = ".npz"
MOST_ARRAYS = 10_000
MOST_PACKED = 32  # times that weights may be larger than their file; random numbers hardly shrink
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # that numpy writes; others may take memory for themselves
SMALL = 2**20  # bytes that may be packed as tightly as they like
BFLOAT16 = "V2"  # as MLX writes it, which NumPy does not know


def read_npz(file: Path) -> dict[str, Tensor]:
    """
    Raises:
        CheckpointError: it is damaged, holds objects, or unpacks to more than it is worth; the message names the file.
        OSError
    """
    try:
        with BoundedFile(file) as stream, zipfile.ZipFile(stream) as archive:
            stream.left = None  # the directory is read
            members = _members(archive, file)
            for name, member in members.items():
                _check_header(archive, member, name, file)
            return {name: _tensor(archive, member) for name, member in members.items()}
    except (CheckpointError, OSError):
        raise
    except Exception as error:  # of a file that is no archive of arrays, those who read it make any error at all
        raise CheckpointError(f"{file}: damaged, or not an npz file ({shown(brief(error))})") from error


def _members(archive: zipfile.ZipFile, file: Path) -> dict[str, zipfile.ZipInfo]:
    members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
    if len(members) > MOST_ARRAYS or len(members) < len(archive.infolist()):
        raise CheckpointError(f"{file}: holds more than {MOST_ARRAYS:,} arrays, or one of them twice")
    if strange := [member.filename for member in members.values() if not member.filename.endswith(".npy")]:
        raise CheckpointError(f"{file}: holds {listed(map(shown, strange), ', ')}, which is no array")
    if any(member.compress_type not in METHODS for member in members.values()):
        raise CheckpointError(f"{file}: is compressed in another way than numpy does it; save it with numpy.savez")
    size, packed = sum(member.file_size for member in members.values()), file.stat().st_size
    if size > SMALL and size > MOST_PACKED * packed:
        text = f"unpacks to {size:,} bytes, more than {MOST_PACKED} times its own {packed:,}"
        raise CheckpointError(f"{file}: {text}; save it with numpy.savez")
    if size > (free := available_memory()):
        raise CheckpointError(f"{file}: unpacks to {size:,} bytes, and {free:,} are free")
    return members


def _check_header(archive: zipfile.ZipFile, member: zipfile.ZipInfo, name: str, file: Path) -> None:
    with archive.open(member) as stream:
        shape, dtype = _header(stream)
        size = math.prod(shape) * dtype.itemsize
        if dtype.hasobject:
            text = "is an array of Python objects, which are not loaded because they can run code"
            raise CheckpointError(f"{file}: {shown(name)} {text}; leave it out, and save the tensors by numpy.savez")
        if size != member.file_size - stream.tell():
            text = f"claims {size:,} bytes, and {member.file_size - stream.tell():,} follow"
            raise CheckpointError(f"{file}: {shown(name)} {text}; it is damaged")
        if dtype.kind not in "fiub" and dtype.str[1:] != BFLOAT16:
            raise CheckpointError(f"{file}: {shown(name)} holds {shown(dtype)}, not numbers")


def _header(stream: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if read is None:
        raise ValueError(f"npy version {version}")
    shape, _, dtype = read(stream)
    return shape, dtype


def _tensor(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> Tensor:
    with archive.open(member) as stream:
        array = np.lib.format.read_array(stream, allow_pickle=False)
    if array.dtype.str[1:] == BFLOAT16:
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.ascontiguousarray(array, array.dtype.newbyteorder("=")))
