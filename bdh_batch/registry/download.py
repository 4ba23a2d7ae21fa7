"""Downloads files over HTTP: resumed where they were cut off, within bounds, whole or not at all.

A download has a folder of its own, named by its URL, with the file's ETag. A later attempt, of this process or another,
resumes it if the file is still the same. This module knows nothing about models.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn, Self

import httpx
from tqdm import tqdm

from bdh_batch import __version__
from bdh_batch.errors import CheckpointError
from bdh_batch.registry.files import Allowance, Staged, check_room, hash_of, write_whole
from bdh_batch.registry.locks import locked
from bdh_batch.system.documents import Malformed, brief, parse_json, read_text, shown

SCHEMES = ("http", "https")
MOST_REDIRECTS = 10
MOST_ATTEMPTS = 100  # for one file
MOST_STALLED = 5  # attempts in a row that received nothing
FIRST_PAUSE = 0.2  # seconds, after the first of those; then doubled
CONNECT_SECONDS, SILENT_SECONDS = 10.0, 60.0
ABSENT = frozenset({404, 410})
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})
RANGE = re.compile(r"bytes (\d{1,18})-\d{1,18}/(?:\d{1,18}|\*)")


class Interrupted(Exception):
    """Raised where an attempt ended before the file was complete; another attempt may succeed."""


class Unfinished(CheckpointError):
    """Raised where a file cannot be fetched at present. A later call resumes it, if the server allows that."""


def plain(url: httpx.URL) -> str:
    """Returns a URL as messages and manifests show it: without user, password and query, which may be secrets."""
    return shown(url.copy_with(userinfo=b"", query=None, fragment=None))


@dataclass(frozen=True, slots=True)
class Download:
    """A file to download.

    Args:
        sha256: of its content, where that is known.
    """

    url: httpx.URL
    name: str
    headers: Mapping[str, str]
    sha256: str | None = None


class Partial:
    """The part of a file that was downloaded so far.

    `etag` is None where the server sent none that tells two versions of the file apart; `sha256` is None until the
    file is complete.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data = folder / "data"
        self._state = folder / "state.json"
        self.etag, self.sha256 = self._read()

    @property
    def size(self) -> int:
        return self.data.stat().st_size if self.data.is_file() else 0

    def begin(self, etag: str | None) -> None:
        """Starts the file anew."""
        self.data.unlink(missing_ok=True)
        self._write(etag, None)

    def end(self) -> Staged:
        """Writes the complete file through to the disk, and hashes it."""
        with self.data.open("ab") as stream:
            os.fsync(stream.fileno())
        sha256 = hash_of(self.data)
        self._write(self.etag, sha256)
        return Staged(self.data, sha256, self.size)

    def drop(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, etag: str | None, sha256: str | None) -> None:
        self.etag, self.sha256 = etag, sha256
        write_whole(self._state, json.dumps({"etag": etag, "sha256": sha256}).encode())

    def _read(self) -> tuple[str | None, str | None]:
        """Reads what an earlier attempt has noted; where that cannot be read, the file is fetched anew."""
        try:
            state = parse_json(read_text(self._state))
        except (FileNotFoundError, Malformed):
            return None, None
        values = [state.get(name) for name in ("etag", "sha256")] if isinstance(state, dict) else [None, None]
        etag, sha256 = (value if isinstance(value, str) else None for value in values)
        return etag, sha256 if self.data.is_file() else None


class Downloads:
    """Downloads files to `folder`, and locks them there until the context ends.

    At the end of the context they are deleted, unless they may be resumed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._held = contextlib.ExitStack()
        self._partials: list[Partial] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        resumable = kind is not None and (issubclass(kind, Unfinished) or not issubclass(kind, Exception))
        if not resumable:
            for partial in self._partials:
                partial.drop()
        self._held.close()

    @cached_property
    def _client(self) -> httpx.Client:
        timeout = httpx.Timeout(SILENT_SECONDS, connect=CONNECT_SECONDS)
        client = httpx.Client(timeout=timeout, headers={"user-agent": f"bdh-batch/{__version__}"})
        return self._held.enter_context(client)

    def fetch(self, wanted: Download, allowance: Allowance) -> Staged | None:
        """Downloads a file; returns None where the server has none.

        Raises:
            Unfinished: the file cannot be fetched at present.
            CheckpointError: it is too large, not what was expected, or refused.
            OSError
        """
        name = wanted.url.copy_with(userinfo=b"", fragment=None)
        folder = self._folder / hashlib.sha256(str(name).encode()).hexdigest()[:32]
        self._held.enter_context(locked(folder))
        partial = Partial(folder)
        self._partials.append(partial)
        try:
            found = self._repeat(wanted, partial, allowance)
        except Interrupted as error:
            kept = bool(partial.size and (partial.etag or wanted.sha256))
            rest = f"; the same command resumes after the {partial.size:,} bytes that were received" if kept else ""
            if not kept:
                partial.drop()
            raise Unfinished(f"{plain(wanted.url)}: cannot be fetched ({error}){rest}") from error
        if found is None:
            partial.drop()
        return found

    def _repeat(self, wanted: Download, partial: Partial, allowance: Allowance) -> Staged | None:
        stalled = 0
        for attempt in range(1, MOST_ATTEMPTS + 1):
            before = partial.size
            try:
                return self._attempt(wanted, partial, allowance)
            except Interrupted:
                stalled = 0 if partial.size > before else stalled + 1
                if stalled == MOST_STALLED or attempt == MOST_ATTEMPTS:
                    raise
            if stalled:
                time.sleep(FIRST_PAUSE * 2 ** (stalled - 1))
        raise AssertionError("the last attempt returns or raises")

    def _attempt(self, wanted: Download, partial: Partial, allowance: Allowance) -> Staged | None:
        known = partial.sha256
        if known is None or known != wanted.sha256:  # else nobody needs to be asked
            try:
                if not self._ask(wanted, partial, allowance):
                    return None
            except httpx.TransportError as error:
                raise Interrupted(brief(error) if str(error) else type(error).__name__) from error
        known = partial.sha256  # None again if it was fetched
        found = partial.end()
        if known is not None and found.sha256 != known:
            partial.begin(None)
            raise Interrupted("the part that was received before is damaged")
        if wanted.sha256 is not None and found.sha256 != wanted.sha256:
            text = f"its SHA-256 is {found.sha256}, and {wanted.sha256} was expected"
            raise CheckpointError(f"{plain(wanted.url)}: {text}")
        return found

    def _ask(self, wanted: Download, partial: Partial, allowance: Allowance) -> bool:
        """Downloads all of the file into `partial`, and returns whether the server has the file."""
        start, conditions = 0, {}
        if partial.sha256 is not None:
            conditions = {"if-none-match": partial.etag} if partial.etag else {}
        elif partial.size and (partial.etag or wanted.sha256):
            start = partial.size
            conditions = {"range": f"bytes={start}-"} | ({"if-range": partial.etag} if partial.etag else {})
        with self._response(wanted, conditions) as response:
            status = response.status_code
            if status in ABSENT:
                return False
            if status == 304 and "if-none-match" in conditions:
                return True
            if status == 416 and start:
                partial.begin(None)
                raise Interrupted("the server has fewer bytes than were received before")
            if status in BUSY:
                raise Interrupted(f"the server responds with {status}")
            if status == 206 and start:
                _check_continued(response, partial, start)
            elif status == 200:
                start = 0
                partial.begin(_strong(response.headers.get("etag")))
            else:
                raise CheckpointError(f"{plain(wanted.url)}: cannot be fetched (the server responds with {status})")
            self._receive(response, wanted, partial, start, allowance)
        return True

    def _receive(
        self, response: httpx.Response, wanted: Download, partial: Partial, start: int, allowance: Allowance
    ) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise CheckpointError(f"{plain(wanted.url)}: the server sends it compressed, though it was asked not to")
        length = response.headers.get("content-length", "")
        total = start + int(length) if re.fullmatch(r"\d{1,18}", length) else None
        if total is not None:
            allowance.check(total, wanted.name)
            check_room(partial.folder, total - start)
        size = start
        with partial.data.open("ab") as stream, _progress(wanted.name, start, total) as bar:
            for chunk in response.iter_raw():
                size += len(chunk)
                allowance.check(size, wanted.name)
                stream.write(chunk)
                bar.update(len(chunk))

    @contextlib.contextmanager
    def _response(self, wanted: Download, conditions: Mapping[str, str]) -> Iterator[httpx.Response]:
        """Returns the response at the end of all redirects. httpx drops credentials where these lead to another host.

        Raises:
            CheckpointError: a redirect leads to another scheme: to a file of this machine, or out of TLS.
        """
        headers = {"accept-encoding": "identity", **wanted.headers, **conditions}
        request = self._client.build_request("GET", wanted.url, headers=headers)
        for _ in range(MOST_REDIRECTS + 1):
            try:
                response = self._client.send(request, stream=True, follow_redirects=False)
            except httpx.InvalidURL as error:
                text = f"it redirects to what is no URL ({brief(error)})"
                raise CheckpointError(f"{plain(wanted.url)}: {text}") from error
            try:
                if response.next_request is None:
                    yield response
                    return
            finally:
                response.close()
            was, request = request.url.scheme, response.next_request
            if request.url.scheme not in SCHEMES or (was == "https" and request.url.scheme != "https"):
                text = f"it redirects from {was} to {plain(request.url)}, which is not followed"
                raise CheckpointError(f"{plain(wanted.url)}: {text}")
        raise CheckpointError(f"{plain(wanted.url)}: it redirects more than {MOST_REDIRECTS} times")


def _check_continued(response: httpx.Response, partial: Partial, start: int) -> None:
    """Checks that a response continues the file. Raises Interrupted where it is of another part or version."""
    found = RANGE.fullmatch(response.headers.get("content-range", ""))
    etag = _strong(response.headers.get("etag"))
    if found is None or int(found[1]) != start or (partial.etag and etag and etag != partial.etag):
        partial.begin(None)
        raise Interrupted("the server sends another part than was asked for")


def _strong(etag: str | None) -> str | None:
    """Returns the ETag if it is a strong one that can be sent back."""
    return etag if etag and re.fullmatch(r'"[!#-~]{1,512}"', etag) else None


def _progress(name: str, start: int, total: int | None) -> tqdm[NoReturn]:
    """Shows a progress bar on stderr, if that is a terminal."""
    quiet = not sys.stderr.isatty()
    return tqdm(
        desc=shown(name), initial=start, total=total, unit="B", unit_scale=True, unit_divisor=1024, disable=quiet
    )
