"""Reads the `neurons.json` that `bdh-batch model neurons` has written: what it says of the text, and of one neuron.

The file has a line for each neuron that fired, in order, and may have hundreds of megabytes: a neuron is found by
halving the file. It lies in a model's folder, which may be a stranger's: reads are bounded, and lines are checked.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import orjson
from pydantic import BaseModel, ValidationError

from bdh_batch.http.neurons.objects import NeuronContexts, Study

FILE = Path("neurons") / "neurons.json"  # in a model's folder
LONGEST_LINE = 2**20  # bytes; 32 contexts of 600 bytes, in the longest escapes, take a tenth
PIECE = 2**14  # bytes that are read at a time
HEAD_END = b',"neurons":['
LAST_LINE = b"]}"
Neuron = tuple[int, int, int]  # layer, head, number
Model = TypeVar("Model", bound=BaseModel)


class Unusable(Exception):
    """The file cannot be read, or is not of this model; the message says why."""


@dataclass(frozen=True)
class StudyFile:
    """A file of a model of `shape`: layers, heads, and neurons of a head.

    Attributes:
        study: what it says of the text.
        begin: where its second line begins.
    """

    descriptor: int
    shape: Neuron
    study: Study
    begin: int
    end: int

    @classmethod
    @contextmanager
    def opened(cls, folder: Path, shape: Neuron) -> Iterator[StudyFile | None]:
        """Opens the file in a model's folder; None where there is none. Raises Unusable."""
        try:
            # A pipe has no end that could be waited for.
            descriptor = os.open(folder / FILE, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (FileNotFoundError, NotADirectoryError):
            yield None
            return
        except OSError as error:
            raise Unusable(f"cannot be read ({error.strerror})") from error
        try:
            yield cls._read(descriptor, shape)
        except OSError as error:
            raise Unusable(f"cannot be read ({error.strerror})") from error
        finally:
            os.close(descriptor)

    @classmethod
    def _read(cls, descriptor: int, shape: Neuron) -> StudyFile:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise Unusable("is not a file")
        head = _line(descriptor, 0)
        if not head.endswith(HEAD_END):
            raise Unusable("is not as bdh-batch model neurons writes it")
        facts = _object(head.removesuffix(HEAD_END) + b"}")
        given = tuple(facts.get(name) for name in ("layers", "heads", "neurons_per_head"))
        if given != shape:
            raise Unusable("is of a model with other layers, heads or neurons")
        study = _checked(Study, {name: facts.get(name) for name in Study.model_fields})
        return cls(descriptor, shape, study, len(head) + 1, status.st_size)

    def find(self, wanted: Neuron) -> NeuronContexts:
        """What the file says of a neuron: one that it does not have never fired. Raises Unusable."""
        low, high = self.begin, self.end
        while low < high:
            middle = (low + high) // 2
            begin = middle if middle == low else _after_line(self.descriptor, middle - 1)
            line = b"" if begin >= high else _line(self.descriptor, begin)
            if not line or line == LAST_LINE:
                high = middle
                continue
            found = _checked(NeuronContexts, _object(line.removesuffix(b",")))
            at = found.layer, found.head, found.neuron
            if at == wanted:
                return found
            if at < wanted:
                low = begin + len(line) + 1
            else:
                high = middle
        layer, head, neuron = wanted
        return NeuronContexts(layer=layer, head=head, neuron=neuron, active=0.0, contexts=[])


def _line(descriptor: int, begin: int) -> bytes:
    """The line at `begin`, without its end."""
    read = b""
    while b"\n" not in read:
        piece = os.pread(descriptor, PIECE, begin + len(read))
        read += piece
        if not piece:
            return read
        if len(read) > LONGEST_LINE:
            raise Unusable("has a line that is too long")
    return read[: read.index(b"\n")]


def _after_line(descriptor: int, within: int) -> int:
    """Where the line that has the byte at `within` ends, and the next one begins."""
    return within + len(_line(descriptor, within)) + 1


def _object(text: bytes) -> dict[str, object]:
    try:
        value = orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unusable("is damaged") from error
    if not isinstance(value, dict):
        raise Unusable("is damaged")
    return value


def _checked(kind: type[Model], values: dict[str, object]) -> Model:
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise Unusable("is damaged") from error
