"""Runs a PostgreSQL server, stops it, and lets it hang."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import psycopg

from tests.conftest import HANG_SECONDS, eventually, free_port

OPTIONS = {
    "listen_addresses": "127.0.0.1",
    "unix_socket_directories": "",
    "fsync": "off",  # no power fails here
    "shared_buffers": "16MB",
    "autovacuum": "off",
}


def programs() -> Path | None:
    """The folder of PostgreSQL's programs, which Debian puts on no path."""
    places = [*os.get_exec_path(), *sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin")), reverse=True)]
    found = shutil.which("initdb", path=os.pathsep.join(places))
    return None if found is None else Path(found).resolve().parent


def unprivileged() -> dict[str, Any]:
    """What Popen needs to run it: it refuses to be root's."""
    return {"user": "postgres", "group": "postgres", "extra_groups": []} if os.geteuid() == 0 else {}


def why_not() -> str | None:
    """Why PostgreSQL cannot run here; None if it can."""
    if programs() is None:
        return "PostgreSQL is not installed: apt-get install postgresql"
    with tempfile.TemporaryDirectory(prefix="bdh-postgresql-") as folder:
        try:
            if os.geteuid() == 0:
                shutil.chown(folder, "postgres", "postgres")
            subprocess.run(["test", "-w", folder], check=True, **unprivileged())
        except (LookupError, OSError, subprocess.SubprocessError) as error:
            return f"PostgreSQL needs a user postgres, who can write to the folder of temporary files: {error}"
    return None


@dataclass
class Postgresql:
    """A server in a folder of its own, at a port of this machine."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    @contextlib.contextmanager
    def run(cls) -> Iterator[Postgresql]:
        with tempfile.TemporaryDirectory(prefix="bdh-postgresql-") as folder:
            server, found = cls(Path(folder), free_port()), programs()
            assert found is not None
            if os.geteuid() == 0:
                shutil.chown(folder, "postgres", "postgres")
            command = [str(found / "initdb"), "-D", f"{folder}/data", "-U", "postgres", "-A", "trust", "--no-sync"]
            command += ["--no-locale", "-E", "UTF8"]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, **unprivileged())
            server.start()
            try:
                yield server
            finally:
                server.thaw()
                server.stop()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@127.0.0.1:{self.port}/postgres"

    def connect(self) -> psycopg.Connection[Any]:
        return psycopg.connect(self.url, autocommit=True)

    def empty(self) -> None:
        with self.connect() as connection:
            connection.execute("DROP SCHEMA IF EXISTS bdh_batch CASCADE")

    def start(self) -> None:
        found = programs()
        assert found is not None
        options = [f"{name}={value}" for name, value in (OPTIONS | {"port": self.port}).items()]
        command = [str(found / "postgres"), "-D", f"{self.folder}/data"]
        command += [part for each in options for part in ("-c", each)]
        with (self.folder / "log").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=self.folder, **unprivileged())
        eventually(self._responds, what=(self.folder / "log").read_text)

    def stop(self) -> None:
        """Ends it and all connections to it. Idempotent."""
        if self.process is not None:
            self.process.send_signal(signal.SIGINT)
            self.process.wait(HANG_SECONDS)
            self.process = None

    def freeze(self) -> None:
        """From now on, connections are accepted and nothing is said."""
        for process in self._processes():
            process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Idempotent."""
        for process in self._processes():
            process.send_signal(signal.SIGCONT)

    def _processes(self) -> list[psutil.Process]:
        if self.process is None:
            return []
        main = psutil.Process(self.process.pid)
        return [main, *main.children(recursive=True)]

    def _responds(self) -> bool:
        try:
            self.connect().close()
        except psycopg.OperationalError:
            return False
        return True
