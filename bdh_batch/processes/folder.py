"""The folder that the processes of one server share: their sockets, and the secrets by which they authenticate."""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bdh_batch.backends.address import LocalAddress
from bdh_batch.backends.recorder import step_file
from bdh_batch.errors import ConfigError

LONGEST = 100  # bytes of a socket's path, with its name: the system takes some more


@dataclass(frozen=True, slots=True)
class RuntimeFolder:
    """A folder with the sockets of a server's processes, which only its owner can enter."""

    path: Path

    @classmethod
    def make(cls) -> RuntimeFolder:
        """Makes a new folder. Raises ConfigError where that is not possible."""
        try:
            path = Path(tempfile.mkdtemp(prefix="bdh-batch-"))
        except OSError as error:
            raise ConfigError(f"TMPDIR: no folder for sockets can be made there ({error})") from error
        if len(bytes(path)) + len("/00/engine-000-000.sock") > LONGEST:
            shutil.rmtree(path, ignore_errors=True)
            raise ConfigError(f"TMPDIR: {path.parent} is too long for the paths of sockets")
        return cls(path)

    def lock(self) -> int:
        """Locks the folder, so that systemd-tmpfiles does not remove it as old; returns the descriptor of the lock."""
        descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        return descriptor

    def of_model(self, number: int) -> RuntimeFolder:
        """The folder in it that is for the engines of one model."""
        return RuntimeFolder(self.path / str(number))

    def make_anew(self) -> None:
        """Makes the folder of a model, with a new secret, and removes what was there. Raises OSError."""
        self.remove()
        self.path.mkdir(mode=0o700)
        file = os.open(self.path / "secret", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(file, "w", encoding="ascii") as secret:
            secret.write(secrets.token_hex(16))

    @property
    def control(self) -> Path:
        """The socket at which the supervisor takes commands."""
        return self.path / "control"

    @property
    def secret(self) -> str:
        """What front ends have to send to the engines of a model."""
        return (self.path / "secret").read_text(encoding="ascii")

    def engine(self, name: str) -> Path:
        """The socket of an engine."""
        return self.path / f"{name}.sock"

    def listen(self, name: str) -> socket.socket:
        """Listens at the socket of an engine; replaces the socket of one of that name that was killed.

        Raises:
            ConfigError: the socket cannot be made.
        """
        path = self.engine(name)
        listener = socket.socket(socket.AF_UNIX)
        try:
            path.with_suffix(".new").unlink(missing_ok=True)
            listener.bind(str(path.with_suffix(".new")))
            listener.listen()
            path.with_suffix(".new").replace(path)  # without a gap: a missing socket means an engine that has left
        except OSError as error:
            listener.close()
            raise ConfigError(f"{path}: the engine cannot listen there ({error})") from error
        return listener

    def agree(self, fingerprint: str) -> None:
        """Has the first engine say what all engines of the server compute.

        Raises:
            ConfigError: this one computes something else.
        """
        path = self.path / "fingerprint"
        try:
            with path.open("x", encoding="ascii") as file:
                file.write(fingerprint)
        except FileExistsError:
            first = path.read_text(encoding="ascii")
            if first and first != fingerprint:
                text = "the weights, dtypes or kernels are not those that the server's first engine had"
                raise ConfigError(f"model.path: {text}: restart the server to change them") from None

    def step(self, name: str) -> Path:
        """The file in which an engine records its current step."""
        return step_file(self.engine(name))

    def heartbeat(self, name: str) -> Path:
        """The file whose time an engine sets again and again, so that its supervisor sees that it does not hang."""
        return self.path / f"{name}.beat"

    def beat(self, name: str) -> None:
        """Sets the time of an engine's heartbeat. Opens no file, but where there is none yet. Raises OSError."""
        try:
            os.utime(self.heartbeat(name))
        except FileNotFoundError:
            self.heartbeat(name).touch(mode=0o600)

    def last_beat(self, name: str) -> int | None:
        """When an engine has set its heartbeat, in ns of the system's clock; None where it has not."""
        try:
            return self.heartbeat(name).stat().st_mtime_ns
        except OSError:
            return None

    def questions(self, name: str) -> Path:
        """The socket at which a process answers the others."""
        return self.path / f"{name}.ask"

    def answering(self) -> Mapping[str, Path]:
        """The sockets at which processes answer, those of engines included, by the processes' names."""
        return {path.stem: path for pattern in ("*.ask", "*/*.ask") for path in sorted(self.path.glob(pattern))}

    def front_ends(self) -> Mapping[str, Path]:
        """Those of `answering` that are of front ends."""
        return {path.stem: path for path in sorted(self.path.glob("*.ask"))}

    def engines(self) -> Mapping[str, LocalAddress]:
        """The addresses of engines, by the engines' names. Raises OSError."""
        return {path.stem: LocalAddress(path) for path in sorted(self.path.glob("*.sock"))}

    def forget(self, name: str) -> None:
        """Removes the files of a process of that name, which was killed or has ended."""
        self.engine(name).unlink(missing_ok=True)
        self.step(name).unlink(missing_ok=True)
        self.heartbeat(name).unlink(missing_ok=True)
        self.questions(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Deletes the folder. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
