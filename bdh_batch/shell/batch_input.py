"""The lines of a batch file, as OpenAI's Batch API has them: `custom_id`, `method`, `url` and `body` of a request."""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import orjson

from bdh_batch.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
MEMBERS = ("custom_id", "method", "url", "body")
WHOLE_ONLY = {"stream": "a line has one response, which is whole", "background": "a line's response is in its output"}
AROUND_BODY = 2**16  # bytes of a line beside its body
BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class Line:
    """A line that is not blank.

    Args:
        number: of the line, from 1 on.
        raw: without white space around; None of one that is too long.
        digest: not 0, and another one for other bytes, most likely.
    """

    number: int
    raw: bytes | None
    digest: int


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """What a line asks for.

    Args:
        body: in JSON.
        sequences: how many it has computed at a time, about.
    """

    custom_id: str
    url: str
    body: bytes
    sequences: int


class BadLine(Exception):
    """A line that is no request: what is wrong with it goes into its output."""

    def __init__(self, code: str, message: str, param: str | None = None, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.param = param
        self.custom_id = custom_id


class BatchInput:
    """A file of requests, which is read line by line, twice: before anything is computed, its lines are counted, and
    those found whose `custom_id` an earlier one has.

    Args:
        most: bytes of a body.

    Raises:
        ConfigError: it cannot be read, or is no file.
    """

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most + AROUND_BODY
        if path.exists() and not path.is_file():
            raise ConfigError(f"-i: {path} is no regular file; it is read twice, and again after an interruption")
        ids = array("Q")
        self.digests = array("I")  # by the number of the line; 0 of a blank one
        for line in self._read():
            self.digests.extend([0] * (line.number - len(self.digests)))
            self.digests.append(line.digest)
            ids.append(_id_digest(line))
        self._repeated = _repeated(ids)

    def __len__(self) -> int:
        return len(self._repeated)

    def lines(self) -> Iterator[Line]:
        """Those that were there when it was read first. Raises ConfigError."""
        for _, line in zip(range(len(self)), self._read()):
            yield line

    def request(self, index: int, line: Line) -> BatchRequest:
        """What the line at `index` asks for. Raises BadLine."""
        if line.raw is None:
            raise BadLine("line_too_long", f"The line has more than {self._most} bytes (limits.max_body_bytes).")
        values = _object(line.raw)
        custom_id = values.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            raise BadLine("invalid_custom_id", "custom_id: Input should be a string, and not empty.", "custom_id")
        if self._repeated[index]:
            text = "custom_id: An earlier line has the same one."
            raise BadLine("duplicate_custom_id", text, "custom_id", custom_id)
        return _request(custom_id, values)

    def _read(self) -> Iterator[Line]:
        try:
            with self._path.open("rb") as file:
                number = 0
                while raw := file.readline(self._most + 1):
                    number += 1
                    whole: bytes | None = raw
                    digest = zlib.crc32(raw.strip())
                    while len(raw) > self._most and not raw.endswith(b"\n"):
                        whole, raw = None, file.readline(self._most + 1)
                        digest = zlib.crc32(raw.rstrip(), digest)
                    if whole is not None:
                        whole = (whole.removeprefix(BOM) if number == 1 else whole).strip()
                    if whole != b"":
                        yield Line(number, whole, digest or 1)
        except OSError as error:
            raise ConfigError(f"-i: {self._path} cannot be read: {error.strerror}") from error


def _object(raw: bytes) -> dict[str, Any]:
    try:
        values = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadLine("invalid_json", f"The line is not valid JSON: {error}.") from error
    if not isinstance(values, dict):
        raise BadLine("invalid_json", "The line should be a JSON object.")
    return values


def _request(custom_id: str, values: dict[str, Any]) -> BatchRequest:
    url, body = values.get("url"), values.get("body")
    if unknown := values.keys() - {*MEMBERS}:
        name = min(unknown)[:128]
        raise BadLine("unknown_member", f"{name}: A line has {', '.join(MEMBERS)}.", name, custom_id)
    if values.get("method") != "POST":
        raise BadLine("invalid_method", "method: Input should be POST.", "method", custom_id)
    if url not in URLS:
        raise BadLine("invalid_url", f"url: Input should be one of {', '.join(URLS)}.", "url", custom_id)
    if not isinstance(body, dict):
        raise BadLine("invalid_body", "body: Input should be a JSON object.", "body", custom_id)
    for name, reason in WHOLE_ONLY.items():
        if body.get(name):
            raise BadLine("unsupported_parameter", f"body.{name}: {reason}.", f"body.{name}", custom_id)
    try:
        raw = orjson.dumps(body)
    except orjson.JSONEncodeError as error:  # what can be read may be nested more deeply than can be written
        raise BadLine("invalid_body", f"body: {error}.", "body", custom_id) from error
    return BatchRequest(custom_id, url, raw, _sequences(body))


def _sequences(body: dict[str, Any]) -> int:
    given = body.get("prompt", body.get("input"))
    prompts = len(given) if isinstance(given, list) and given and not isinstance(given[0], int) else 1
    choices = [body.get(name) for name in ("n", "best_of")]
    return prompts * max([each for each in choices if type(each) is int and each > 0], default=1)


def _id_digest(line: Line) -> int:
    """Not 0 where the line has a `custom_id`, and another one for each, most likely: 64 bits."""
    try:
        custom_id = _object(line.raw or b"").get("custom_id")
        text = custom_id.encode() if isinstance(custom_id, str) else b""
    except BadLine:
        return 0
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little") if text else 0


def _repeated(ids: array[int]) -> bytearray:
    """For each, whether an earlier one is the same. 0 is nothing."""
    known = np.frombuffer(ids, np.uint64) if ids else np.zeros(0, np.uint64)
    order = np.argsort(known, kind="stable")
    ordered = known[order]
    found = np.zeros(len(known), np.uint8)
    found[order[1:][(ordered[1:] == ordered[:-1]) & (ordered[1:] != 0)]] = 1
    return bytearray(found.tobytes())
