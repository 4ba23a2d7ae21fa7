"""Reads the small documents that people and models bring: JSON and plain text (`yaml_documents.py` has YAML).

They come from strangers, so every read is bounded: in bytes, in depth, in the length of a number. Text is UTF-8,
whatever the locale says. Whatever is wrong is reported in one line. Knows nothing about what the documents mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from bdh_batch.errors import CheckpointError

LARGEST_JSON = 16 * 2**20  # bytes; tokenizer_config.json of a large vocabulary takes one or two MiB
LARGEST_TEXT = 2**20  # bytes of a chat template, or of settings
TOKENIZER_FOLDER = "tokenizer"  # in a model folder
DEEPEST = 64  # lists and objects inside one another
LONGEST_NUMBER = 400  # characters: float64's largest has 309 digits
MOST_LISTED = 50  # problems named in one message


class Malformed(ValueError):
    """A document that cannot be read; the message is one line, without the document's name."""


def read_json(file: Path) -> dict[str, Any]:
    """The JSON object in a file of a model folder.

    Raises:
        CheckpointError: it cannot be read, is not one, or is beyond the bounds; the message names the file.
    """
    try:
        values = parse_json(read_text(file, LARGEST_JSON))
    except (OSError, Malformed) as error:
        raise unreadable(file, error) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{file}: should be an object, is a {type(values).__name__}")
    return values


def read_json_beside(file: Path) -> dict[str, Any]:
    """As `read_json`, of a file that a model folder need not have: empty where it is missing."""
    try:
        there = file.is_file()
    except OSError as error:
        raise unreadable(file, error) from error
    return read_json(file) if there else {}


def of_tokenizer(folder: Path, name: str) -> Path:
    """Returns where a model folder has a file of its tokenizer: beside the weights, or in a folder of its own."""
    nested = folder / TOKENIZER_FOLDER / name
    return nested if nested.is_file() and not (folder / name).exists() else folder / name


def unreadable(file: Path, error: OSError | Malformed) -> CheckpointError:
    """The error of a file of a model that could not be read."""
    reason = str(error) if isinstance(error, Malformed) else f"cannot be read ({error.strerror or error})"
    return CheckpointError(f"{file}: {shown(reason)}")


def read_text(file: Path, most: int = LARGEST_TEXT) -> str:
    """The UTF-8 text in a file, which may be a pipe; a byte order mark is not part of it.

    Raises:
        Malformed: it has more than `most` bytes, or is not UTF-8.
        OSError: it cannot be opened.
    """
    with file.open("rb") as stream:
        raw = stream.read(most + 1)
    if len(raw) > most:
        raise Malformed(f"is larger than {most:,} bytes")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Malformed(f"not UTF-8 ({error.reason} at byte {error.start})") from error


def parse_json(text: str) -> object:
    """What `json.loads` makes of it, but within bounds, without NaN, and with each key of an object given once.

    Raises:
        Malformed
    """
    try:
        values = json.loads(
            text,
            object_pairs_hook=_once,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_no_constant,
        )
    except Malformed:
        raise
    except (ValueError, RecursionError, MemoryError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deeply"
        raise Malformed(f"not JSON ({shown(reason)})") from error
    _check_depth(values)
    return values


def shown(name: object) -> str:
    """A name from a file, fit for one line of text."""
    text = str(name)
    return text if text.isprintable() else ascii(text)


def brief(value: object, most: int = 100) -> str:
    """A value from a file, fit for a message: cut where it is long."""
    try:
        text = str(value) if isinstance(value, BaseException) else repr(value)
    except (ValueError, RecursionError):  # an integer beyond what Python prints, or nested without an end
        return f"a very large {type(value).__name__}"
    return shown(text if len(text) <= most else f"{text[:most]}…")


def listed(problems: Iterable[str], separator: str = "; ") -> str:
    """All problems in one message, but no more of them than people read."""
    every = list(problems)
    more = [f"and {len(every) - MOST_LISTED:,} more"] if len(every) > MOST_LISTED else []
    return separator.join([*every[:MOST_LISTED], *more])


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise Malformed(f"not JSON (the key {brief(name)} is given twice)")
            seen.add(name)
    return values


def _integer(text: str) -> int:
    if len(text) > LONGEST_NUMBER:
        raise Malformed(f"holds a number of {len(text):,} digits")
    return int(text)


def _finite(text: str) -> float:
    if len(text) > LONGEST_NUMBER:
        raise Malformed(f"holds a number of {len(text):,} digits")
    if not math.isfinite(value := float(text)):
        raise Malformed(f"holds a number that is too large, {brief(text)}")
    return value


def _no_constant(name: str) -> NoReturn:
    raise Malformed(f"not JSON ({name} is not a number)")


def _check_depth(values: object) -> None:
    level = [values]
    for _ in range(DEEPEST):
        level = [
            member
            for each in level
            if isinstance(each, dict | list)
            for member in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return
    if any(isinstance(each, dict | list) for each in level):
        raise Malformed(f"nested more than {DEEPEST} deep")


def values_in(root: object) -> Iterator[object]:
    """`root` and every value in it, at whatever depth and without recursion. The keys of objects are none."""
    ahead = [root]
    while ahead:
        each = ahead.pop()
        yield each
        if isinstance(each, Mapping):
            ahead += each.values()
        elif isinstance(each, list):
            ahead += each
