"""The files of the page, read once. It does not know who asks for them, or how."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import MappingProxyType

STATIC = Path(__file__).with_name("static")
INDEX = "index.html"
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


@dataclass(frozen=True, slots=True)
class Asset:
    """A file of the page. `etag` changes with its content, and is quoted as HTTP has it."""

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> Mapping[str, Asset]:
    """All files by their paths below `static`, with forward slashes: some hundred KiB."""
    files = sorted(each for each in STATIC.rglob("*") if each.suffix in MEDIA_TYPES)
    return MappingProxyType({each.relative_to(STATIC).as_posix(): _read(each) for each in files})


def _read(file: Path) -> Asset:
    content = file.read_bytes()
    return Asset(content, MEDIA_TYPES[file.suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
