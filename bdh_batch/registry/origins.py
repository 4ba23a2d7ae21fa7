"""The origins that models are fetched from: a local folder or file, a URL, a repository of the Hugging Face Hub.

An origin fetches one file at a time; `add.py` decides which files a model has.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote

import httpx

from bdh_batch.checkpoint.convert import inside
from bdh_batch.checkpoint.files import FILE_SUFFIXES, HUGGING_FACE_NAMES, weights_among
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.registry.download import SCHEMES, Download, Downloads, plain
from bdh_batch.registry.files import Allowance, Staged, copy
from bdh_batch.registry.hub import open_repository
from bdh_batch.system.documents import brief, of_tokenizer, shown

SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
KNOWN = (*SCHEMES, "file", "hf")
WEIGHT_SUFFIXES = (".safetensors", ".bin", *FILE_SUFFIXES)
ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".gguf", ".onnx")


class Origin(Protocol):
    """A folder, URL or repository from which the files of a model are fetched.

    `remote` says that its files are not trusted; `entry` is the file that was named, None where a folder was.
    """

    source: str  # for messages and the manifest: without secrets
    remote: bool
    entry: str | None
    revision: str | None

    def candidates(self) -> Collection[str]:
        """Returns the file names that weights may have here; the first file that exists contains them.

        Raises:
            CheckpointError: there is nothing to load.
        """

    def fetch(self, name: str, sha256: str | None, folder: Path, allowance: Allowance) -> Staged | None:
        """Fetches a file, into `folder` or the downloads; returns None where there is none of this name.

        Raises:
            CheckpointError, OSError
        """


def open_origin(text: str, downloads: Downloads) -> Origin:
    """Returns the origin of a model's source as the command line has it.

    Raises:
        ConfigError: the source is no path, and no URL of a known scheme.
        CheckpointError: nothing exists there.
    """
    if not text or not text.isprintable():
        raise ConfigError(f"{brief(text)}: a path, a URL or hf:ORG/NAME is expected")
    match = SCHEME.match(text)
    scheme = match[1].lower() if match else ""
    if scheme == "hf":
        return HubOrigin(text, downloads)
    if scheme in SCHEMES:
        return UrlOrigin(text, downloads)
    if scheme == "file":
        return LocalOrigin(_path_of(text), remote=True)
    if "://" in text:
        raise ConfigError(f"{brief(text)}: models come from {', '.join(KNOWN)} and paths, not from {scheme or 'this'}")
    return LocalOrigin(Path(text), remote=False)


def _path_of(url: str) -> Path:
    """Returns the path of a `file:` URL."""
    rest = url.partition(":")[2]
    host, path = (
        ("", rest) if not rest.startswith("//") else (rest[2:].partition("/")[0], "/" + rest[2:].partition("/")[2])
    )
    path = unquote(path)
    if host not in ("", "localhost") or not path.startswith("/") or not path.isprintable():
        raise ConfigError(f"{brief(url)}: file:///absolute/path is expected")
    return Path(path)


class LocalOrigin:
    """A local model folder, or a file and the files beside it."""

    revision: str | None = None

    def __init__(self, path: Path, remote: bool) -> None:
        path = Path(os.path.abspath(path))
        self.source, self.remote = str(path), remote
        if not path.exists():
            raise CheckpointError(f"there is no model at {shown(path)}")
        self.entry: str | None = None if path.is_dir() else path.name
        self._folder = path if path.is_dir() else path.parent

    def candidates(self) -> Collection[str]:
        if self.entry is not None:
            return (self.entry,)
        names = {file.name for file in self._folder.iterdir() if file.is_file()}
        return (weights_among(names, shown(self._folder)),)

    def fetch(self, name: str, sha256: str | None, folder: Path, allowance: Allowance) -> Staged | None:
        if not os.path.lexists(of_tokenizer(self._folder, name)):
            return None
        found = copy(inside(self._folder, name), folder / name, allowance)
        if sha256 is not None and found.sha256 != sha256:
            text = f"its SHA-256 is {found.sha256}, and {sha256} was expected"
            raise CheckpointError(f"{shown(self._folder / name)}: {text}")
        return found


class UrlOrigin:
    """A file at a URL, or a folder below one."""

    remote: bool = True
    revision: str | None = None

    def __init__(self, text: str, downloads: Downloads) -> None:
        try:
            self._url = httpx.URL(text)
        except httpx.InvalidURL as error:
            raise ConfigError(f"{brief(text)}: is not a URL ({brief(error)})") from error
        if not self._url.host:
            raise ConfigError(f"{brief(text)}: has no host")
        self.source = plain(self._url)
        self._downloads = downloads
        name = self._url.path.rpartition("/")[2]
        suffix = Path(name).suffix.lower()
        if suffix in ARCHIVES:
            raise ConfigError(f"{self.source}: {suffix} files are not read; a folder's URL, or that of one file, is")
        self.entry: str | None = name if suffix in WEIGHT_SUFFIXES else None

    def candidates(self) -> Collection[str]:
        return HUGGING_FACE_NAMES if self.entry is None else (self.entry,)

    def fetch(self, name: str, sha256: str | None, folder: Path, allowance: Allowance) -> Staged | None:
        url = self._url
        if self.entry is None:
            url = url.copy_with(path=f"{url.path.rstrip('/')}/{name}")
        elif name != self.entry:
            return None
        return self._downloads.fetch(Download(url, name, {}, sha256), allowance)


class HubOrigin:
    """A commit of a repository of the Hugging Face Hub."""

    remote: bool = True
    entry: str | None = None

    def __init__(self, source: str, downloads: Downloads) -> None:
        self._repository = open_repository(source)
        self._downloads = downloads
        self.source = source
        self.revision: str | None = self._repository.commit

    def candidates(self) -> Collection[str]:
        return (weights_among(self._repository.top, self.source),)

    def fetch(self, name: str, sha256: str | None, folder: Path, allowance: Allowance) -> Staged | None:
        if name not in self._repository.files:
            return None
        return self._downloads.fetch(self._repository.wanted(name, sha256), allowance)
