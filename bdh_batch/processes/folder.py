"""The folder that the processes of one server share: their sockets, and the secret that they know each other by."""

from __future__ import annotations

import secrets
import shutil
import socket
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from bdh_batch.backends.recorder import step_file
from bdh_batch.errors import ConfigError

LONGEST = 100  # bytes of a socket's path, with its name: the system takes some more


@dataclass(frozen=True, slots=True)
class RuntimeFolder:
    """A folder of sockets, which only its owner can enter."""

    path: Path

    @classmethod
    def make(cls) -> RuntimeFolder:
        """Raises ConfigError where none can be made."""
        try:
            path = Path(tempfile.mkdtemp(prefix="bdh-batch-"))
            (path / "secret").write_text(secrets.token_hex(16), encoding="ascii")
            (path / "secret").chmod(0o600)
        except OSError as error:
            raise ConfigError(f"TMPDIR: no folder for sockets can be made there ({error})") from error
        if len(bytes(path)) + len("/engine-000-000.sock") > LONGEST:
            shutil.rmtree(path, ignore_errors=True)
            raise ConfigError(f"TMPDIR: {path.parent} is too long for the paths of sockets")
        return cls(path)

    @property
    def secret(self) -> str:
        return (self.path / "secret").read_text(encoding="ascii")

    def engine(self, name: str) -> Path:
        return self.path / f"{name}.sock"

    def listen(self, name: str) -> socket.socket:
        """Listens at the socket of an engine, in the place of one of that name that was killed.

        Raises:
            ConfigError: it cannot.
        """
        path = self.engine(name)
        listener = socket.socket(socket.AF_UNIX)
        try:
            listener.bind(str(path.with_suffix(".new")))
            listener.listen()
            path.with_suffix(".new").replace(path)  # never away, as one is that is gone for good
        except OSError as error:
            listener.close()
            raise ConfigError(f"{path}: the engine cannot listen there ({error})") from error
        return listener

    def step(self, name: str) -> Path:
        """Where an engine records what it computes."""
        return step_file(self.engine(name))

    def front_end(self, name: str) -> Path:
        """Where a front end tells its metrics."""
        return self.path / f"{name}.metrics"

    def engines(self) -> Mapping[str, Path]:
        """The sockets of engines, by the engines' names."""
        return {path.stem: path for path in sorted(self.path.glob("*.sock"))}

    def front_ends(self) -> Mapping[str, Path]:
        return {path.stem: path for path in sorted(self.path.glob("*.metrics"))}

    def forget(self, name: str) -> None:
        """The sockets of a process of that name, which was killed or has ended."""
        self.engine(name).unlink(missing_ok=True)
        self.step(name).unlink(missing_ok=True)
        self.front_end(name).unlink(missing_ok=True)

    def remove(self) -> None:
        """Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)
