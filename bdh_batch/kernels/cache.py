"""Keeps compiled kernels on disk where that can be done, and does without where it cannot.

Numba's own cache ends a program at its import where no folder can be written, and at a call where an entry is damaged
or the disk is full. A start must not depend on any of it: it only takes longer. What keeps kernels from being kept is
logged once.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import pickle
import tempfile
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from numba.core import caching

log = logging.getLogger(__name__)

DIGEST = hashlib.sha256().digest_size
XDG = os.environ.get("XDG_CACHE_HOME")
SUFFIX = ".sha256"  # of the files' names: Numba's own have no digest

MODULES = sorted(Path(__file__).parent.glob("*.py"))  # of the kernels, which are compiled into one another
NO_FOLDER = "no folder for them can be written"
_warned: list[str] = []


def keep_compiled(dispatcher: Any, sources: Hashable) -> None:
    """Has what `dispatcher` compiles kept on disk until `sources` are others, if there is a folder for it."""
    try:
        cache = _Cache(dispatcher.py_func, sources)
    except (OSError, RuntimeError):  # Numba's, where there is no folder at all
        _warn_once(NO_FOLDER)
        return
    dispatcher._cache = cache
    if isinstance(cache._impl.locator, _Readable):
        _warn_once(NO_FOLDER)


@functools.cache
def digest_of(*files: Path) -> str:
    """Of names and contents; neither folders nor times of changes count, as a copy compiles to the same."""
    found = hashlib.sha256()
    for file in files:
        found.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


def choose_triton_cache(environment: Mapping[str, str] = os.environ) -> str | None:
    """A new folder for what Triton compiles, where its own cannot be written; None where that can."""
    own = environment.get("TRITON_CACHE_DIR") or os.path.join(
        environment.get("TRITON_HOME") or os.path.expanduser("~"), ".triton", "cache"
    )
    if os.path.isabs(own):
        try:
            os.makedirs(own, exist_ok=True)
            with tempfile.TemporaryFile(dir=own):
                return None
        except OSError as error:
            log.debug("Triton's cache %s: %s", own, error)
    folder = tempfile.mkdtemp(prefix="bdh-triton-")
    log.warning("compiled kernels are not kept: %s cannot be written; TRITON_CACHE_DIR names another folder", own)
    return folder


def _warn_once(reason: str) -> None:
    """Logs once: what is so for one kernel is so for all."""
    if not _warned:
        _warned.append(reason)
        log.warning(
            "compiled CPU kernels are not kept (%s): the next start compiles them again, which takes up to a minute; "
            "NUMBA_CACHE_DIR names a folder for them",
            reason,
        )


class _Readable:
    """A folder that others have filled, as an image's author may, and that cannot be written now."""

    def ensure_cache_path(self) -> None:
        os.listdir(self.get_cache_path())  # type: ignore[attr-defined]


class _Provided(caching.UserProvidedCacheLocator):
    """NUMBA_CACHE_DIR, which installations and checkouts with the same sources share."""

    @classmethod
    def get_suitable_cache_subpath(cls, py_file: str) -> str:
        file = Path(py_file)
        return f"{file.parent.name}-{digest_of(file, *MODULES)[:16]}"


class _ReadableProvided(_Readable, _Provided):
    pass


class _ReadableInTree(_Readable, caching.InTreeCacheLocator):
    pass


class _Result(caching.CompileResultCacheImpl):
    """Where Numba's files may lie: in NUMBA_CACHE_DIR, beside the source, or in the user's folder if there is one.

    Where none of these can be written, one that can be read is better than none.
    """

    _locator_classes: list[Any] = [  # noqa: RUF012 - Numba's own declaration
        _Provided,
        caching.InTreeCacheLocator,
        # For a user without a home, Numba would make a folder called ~.
        *([caching.UserWideCacheLocator] if os.path.isabs(XDG or os.path.expanduser("~")) else []),
        *(_ReadableProvided, _ReadableInTree),
    ]


class _Files(caching.IndexDataCacheFile):
    """The files of one function, each with a digest at its end: damaged machine code would end the process."""

    def _dump(self, obj: object) -> bytes:
        content: bytes = super()._dump(obj)  # type: ignore[no-untyped-call]
        return content + hashlib.sha256(content).digest()

    def _load_data(self, name: str) -> Any:
        return _whole(Path(self._cache_path, name))

    def _save_index(self, overloads: dict[Any, str]) -> None:
        with self._open_for_write(self._index_path) as file:
            file.write(self._dump((self._version, self._source_stamp, overloads)))

    def _load_index(self) -> dict[Any, str]:
        try:
            version, stamp, overloads = _whole(Path(self._index_path))
        except OSError:  # missing, or as good as missing
            return {}
        return dict(overloads) if (version, stamp) == (self._version, self._source_stamp) else {}


def _whole(file: Path) -> Any:
    """
    Raises:
        OSError: the file cannot be read, is damaged or of another version, which Numba takes for a missing one.
    """
    content = file.read_bytes()
    body = content[:-DIGEST]
    if hashlib.sha256(body).digest() != content[-DIGEST:]:
        log.warning("%s is damaged; what it should hold is compiled again", file)
        raise OSError(f"{file} is damaged")
    try:
        return pickle.loads(body)
    except (AttributeError, ImportError) as error:  # another version of the package had a type elsewhere
        log.info("%s is of another version (%s); what it should hold is compiled again", file, error)
        raise OSError(f"{file} is of another version") from error


class _Cache(caching.FunctionCache):
    """As Numba's, but what goes wrong with it is logged, and the function compiled."""

    _impl_class = _Result

    def __init__(self, function: Any, sources: Hashable) -> None:
        super().__init__(function)  # type: ignore[no-untyped-call]
        stamp = (digest_of(Path(function.__code__.co_filename)), sources)
        self._cache_file = _Files(  # type: ignore[no-untyped-call]
            self._cache_path, self._impl.filename_base + SUFFIX, stamp
        )

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]
        except OSError as error:
            _warn_once(f"{self._cache_path}: {error.strerror or error}")
            self.disable()  # type: ignore[no-untyped-call]
