"""API keys: how they are made, kept in a file, and found again while a server runs.

A line of the file is a record in JSON, with the key's SHA-256 and never the key, or a key in plain, as older files have
them; `#` begins a comment. A key that is made here has 256 random bits, which nobody can guess from a digest however
fast the digest is: a plain SHA-256 is right for it, where a password would need a slow one.

The file may be read while somebody writes it, and no part of a key may pass for a key. A plain key has at least
`LEAST_PLAIN` visible ASCII characters, none of which a piece of a record would contain; what begins as our own keys do
has their length; and a plain key at the end of the file counts once its line is ended. A record cannot be cut
unnoticed: no proper prefix of a JSON object is one.

Knows nothing of HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
import stat
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from bdh_batch.errors import ConfigError

log = logging.getLogger(__name__)

PREFIX = "bdh-"
OWN_KEY = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
LEAST_PLAIN = 3  # characters of a key in plain: files that are there may hold short ones
PLAIN_KEY = re.compile(f"[!#-z|~]{{{LEAST_PLAIN},}}")  # visible ASCII but for the quotes and braces of a record
MOST_BYTES = 16 * 2**20  # of a file of keys
OTHERS = stat.S_IRWXG | stat.S_IRWXO
LOOK_SECONDS = 1.0  # between looks at the file
WATCHER = "bdh-keys"  # the name of the thread that looks


class Key(BaseModel):
    """The rights of an API key; None is no restriction of its own."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    name: str = Field("", pattern=r"^[^\x00-\x1f\x7f]{0,64}$")
    created: datetime | None = None
    models: tuple[str, ...] | None = None
    weight: Annotated[float, Field(ge=0.001, le=1000)] | None = None  # its share beside other keys
    requests_per_minute: PositiveInt | None = None
    tokens_per_minute: PositiveInt | None = None
    operator: bool | None = None  # whether it may load and unload models, and see the engine processes
    top_priority: int | None = None  # the lowest `priority`, which goes first, of its requests; None is no such right

    @property
    def id(self) -> str:
        """What the key is called wherever the key itself has no business."""
        return self.sha256[:16]


def digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


class KeyFile:
    """Reads and writes the file of API keys.

    Raises (everywhere):
        ConfigError: the file cannot be read or written, or a line of it is no key.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._warned = False  # of its mode

    def read(self) -> list[Key]:
        return [key for _, key in self._lines() if key is not None]

    def stamp(self) -> object:
        """Changes whenever the file does. Raises OSError."""
        status = self.path.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size

    def add(self, make: Callable[[str], Key]) -> str:
        """A new key, which is returned here and nowhere else; `make` gets its digest."""
        secret = PREFIX + secrets.token_urlsafe(32)
        key = make(digest(secret))
        with self._locked():
            lines = self._lines() if self.path.exists() else []
            if any(other is not None and other.name == key.name for _, other in lines):
                raise ConfigError(f"there is a key named {key.name!r} already")
            self._write([*(line for line, _ in lines), key.model_dump_json(exclude_none=True)])
        return secret

    def revoke(self, id_or_name: str) -> Key:
        with self._locked():
            lines = self._lines()
            found = [key for _, key in lines if key is not None and id_or_name in (key.id, key.name)]
            if not id_or_name or not found:
                raise ConfigError(f"{self.path} has no key {id_or_name!r}")
            if len({key.id for key in found}) > 1:
                raise ConfigError(f"{self.path} has several keys {id_or_name!r}; give the id")
            self._write(line for line, key in lines if key is None or key.id != found[0].id)
        return found[0]

    def _lines(self) -> list[tuple[str, Key | None]]:
        """The lines as they are, and the key in each that has one."""
        try:
            *lines, rest = self._content().decode("utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"{self.path} cannot be read ({_reason(error)})") from None
        found = [(line, self._key(line, number, ended=True)) for number, line in enumerate(lines, 1)]
        return [*found, (rest, self._key(rest, len(found) + 1, ended=False))] if rest else found

    def _content(self) -> bytes:
        """Whatever stands at the path, this neither waits for a writer, as opening a FIFO would, nor reads for ever."""
        with open(os.open(self.path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ConfigError(f"{self.path} is not a regular file")
            content = file.read(MOST_BYTES + 1)
        if len(content) > MOST_BYTES:
            raise ConfigError(f"{self.path} has more than {MOST_BYTES} bytes")
        if status.st_mode & OTHERS and not self._warned:
            self._warned = True
            mode = stat.S_IMODE(status.st_mode)
            log.warning("%s has mode %04o: others than its owner may use it; chmod 600 %s", self.path, mode, self.path)
        return content

    def _key(self, line: str, number: int, ended: bool) -> Key | None:
        """Raises ConfigError, which never repeats the line: what stands there may be a key."""
        if line.lstrip().startswith("{"):
            try:
                return Key.model_validate_json(line)
            except ValidationError as error:
                problem = error.errors(include_input=False)[0]
                where = ".".join(map(str, problem["loc"])) or "the line"
                raise ConfigError(f"{self.path}, line {number}: {where}: {problem['msg']}") from None
        plain, comment, _ = line.partition("#")
        plain = plain.strip()
        if not plain:
            return None
        is_own = OWN_KEY.fullmatch(plain) is not None
        if not is_own and (plain.startswith(PREFIX) or not PLAIN_KEY.fullmatch(plain)):
            text = f"neither a record nor a key in plain ({LEAST_PLAIN} or more visible ASCII characters without quotes"
            raise ConfigError(f"{self.path}, line {number}: {text} and braces; {PREFIX}… as it was made)")
        if not (ended or comment or is_own):
            raise ConfigError(f"{self.path}, line {number}: a newline has to end it; without one it may be half a key")
        return Key(sha256=digest(plain))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        # The file itself cannot hold the lock: writing replaces it.
        lock = self.path.with_name(f".{self.path.name}.lock")
        try:
            handle = os.open(lock, os.O_CREAT | os.O_RDWR, 0o600)
        except OSError as error:
            raise ConfigError(f"{lock} cannot be written ({_reason(error)})") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def _write(self, lines: Iterable[str]) -> None:
        """Whole or not at all, and for nobody but its owner to read."""
        target = self.path.resolve()
        try:
            handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")  # with mode 0600
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.writelines(f"{line}\n" for line in lines)
                    file.flush()
                    os.fsync(file.fileno())
                    if os.geteuid() == 0 and target.exists():  # the server may run as someone else
                        os.fchown(file.fileno(), target.stat().st_uid, target.stat().st_gid)
                os.replace(name, target)
            except BaseException:
                os.unlink(name)
                raise
        except OSError as error:
            raise ConfigError(f"{target} cannot be written ({_reason(error)})") from None


class KeyRing:
    """The keys that a running server knows: those of its settings, and those of a file as it is now.

    Raises:
        ConfigError: there is no key, or the file is not one of keys.
    """

    def __init__(self, plain: Iterable[str], path: Path | None) -> None:
        self._fixed = [Key(sha256=digest(key)) for key in plain]
        self._file = None if path is None else KeyFile(path)
        self._stamp: object = None
        self._keys: dict[str, Key] = {}
        self._by_id: dict[str, Key] = {}
        if self._file is not None:
            with contextlib.suppress(OSError):  # reading the file will say what is wrong with it
                self._stamp = self._file.stamp()
        self._load()
        if not self._keys or digest("") in self._keys:
            raise ConfigError(
                "auth.enabled asks for keys: set auth.api_keys or auth.api_keys_file to ones that are not empty"
            )

    def find(self, secret: str) -> Key | None:
        """The key that `secret` is. How long that takes reveals nothing of any key: only digests are looked up and
        compared, and nobody can choose a digest."""
        hashed = digest(secret)
        key = self._keys.get(hashed)
        known = hmac.compare_digest(hashed, key.sha256 if key is not None else "0" * 64)
        return key if known else None

    @property
    def by_id(self) -> Mapping[str, Key]:
        """All keys, as they are now. What is returned does not change when they do."""
        return self._by_id

    def refresh(self) -> None:
        """Takes in the file if it has changed. A broken one leaves the keys as they are, and is reported once."""
        if self._file is None:
            return
        try:
            stamp = self._file.stamp()
        except OSError as error:
            stamp = _reason(error)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self._load()
            log.info("auth.api_keys_file was read anew: %d keys in all", len(self._keys))
        except ConfigError as error:
            log.warning("the keys stay as they were: %s", error)

    async def watch(self) -> None:
        """Refreshes until it is cancelled, in a thread that keeps neither the event loop nor the end of the program
        waiting where the file's disk hangs."""
        stopped = threading.Event()
        threading.Thread(target=self._watch, args=(stopped,), name=WATCHER, daemon=True).start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            stopped.set()

    def _watch(self, stopped: threading.Event) -> None:
        while not stopped.wait(LOOK_SECONDS):
            self.refresh()

    def _load(self) -> None:
        try:
            listed = [] if self._file is None else self._file.read()
        except ConfigError as error:
            raise ConfigError(f"auth.api_keys_file: {error}") from None
        self._keys = {key.sha256: key for key in (*self._fixed, *listed)}
        self._by_id = {key.id: key for key in self._keys.values()}


def new_key(sha256: str, name: str, rights: Mapping[str, object]) -> Key:
    """A record for `KeyFile.add`. Raises ConfigError: no name, or a right that cannot be."""
    if not name.strip():
        raise ConfigError("name: Input should not be empty")
    values = {"sha256": sha256, "name": name, "created": datetime.now(UTC).replace(microsecond=0), **rights}
    try:
        return Key.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ConfigError(f"{problem['loc'][0]}: {problem['msg']}, not {problem['input']!r}") from None


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
