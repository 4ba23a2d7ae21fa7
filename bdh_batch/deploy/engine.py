"""An engine on the cluster, in the process that Ray started for it: it listens at a port for front ends."""

from __future__ import annotations

import asyncio
import os
import socket
import tempfile
from pathlib import Path

from bdh_batch.deploy.directory import Listed
from bdh_batch.deploy.scaling import CAPACITY, OUTSTANDING
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.processes.served_engine import ServedEngine
from bdh_batch.store.folders import LockedFolder, remove_abandoned

RECORDS = "bdh-batch-record-"  # how the folders of engines' records begin


class NetworkEngine:
    """A loaded engine that listens at a port of one address.

    Args:
        listed: what front ends have to know of it.
    """

    def __init__(self, engine: ServedEngine, server: asyncio.Server, folder: LockedFolder, listed: Listed) -> None:
        self.listed = listed
        self.exposition = engine.exposition
        self.figures = engine.watched.figures
        self._engine = engine
        self._server = server
        self._folder = folder

    @classmethod
    async def open(
        cls, model: ModelSettings, number: int, name: str, host: str, secret: str, beside_store: bool = True
    ) -> NetworkEngine:
        """Loads a model and listens for front ends.

        Args:
            number: of the model.
            name: of the engine, which no other one has.
            host: the address of this machine at which the cluster's other machines reach it.
            secret: what front ends have to send to be let in.
            beside_store: whether front ends are on this machine, and so is a store that they made.

        Raises:
            ConfigError: it cannot start; the error names this machine.
        """
        where = f"on the node {host} ({socket.gethostname()})"
        folder = _record_folder()
        record = folder.path / "engine.step"
        try:
            _check_store(model, beside_store)
            engine = await ServedEngine.open(model, secret, record)
        except (ConfigError, CheckpointError) as error:
            folder.remove()
            raise ConfigError(f"{where}: {error}") from error
        except BaseException:
            folder.remove()
            raise
        try:
            server = await asyncio.get_running_loop().create_server(engine.port.new_connection, host, 0)
        except OSError as error:
            await engine.close()
            folder.remove()
            raise ConfigError(f"{where}: the engine cannot listen ({error})") from error
        port = server.sockets[0].getsockname()[1]
        fingerprint = engine.port.welcome.fingerprint
        return cls(engine, server, folder, Listed(name, number, host, port, str(record), fingerprint))

    def health(self) -> str | None:
        """Returns why it cannot compute, or None."""
        return self._engine.backend.health()

    def stats(self, target_load: float) -> dict[str, float]:
        """Returns its load, as `scaling.desired_engines` takes it."""
        load = self._engine.load()
        return {OUTSTANDING: float(load.running + load.waiting), CAPACITY: max(1.0, target_load * load.slots)}

    async def close(self, seconds: float) -> None:
        """Has front ends move its streams to other engines, for so long at most, and ends it. To be called once."""
        await self._engine.leave(seconds)
        self._server.close()
        await self._engine.close()
        self._folder.remove()


def _record_folder() -> LockedFolder:
    parent = Path(tempfile.gettempdir())
    try:
        remove_abandoned(parent, RECORDS)
        return LockedFolder.make(parent, RECORDS)
    except OSError as error:
        raise ConfigError(f"TMPDIR: no folder can be made in {parent} ({error})") from error


def _check_store(model: ModelSettings, beside: bool) -> None:
    """Raises ConfigError: the folder of the store, in which engines read and write states, is not on this machine."""
    path = model.settings.store.path
    if path is None and not beside:
        raise ConfigError("store.path: engines read and write states there; set it to a folder that all nodes share")
    if path is not None and not os.access(path, os.R_OK | os.W_OK | os.X_OK):
        raise ConfigError(f"store.path: {path} is not there, or cannot be written: all nodes have to share it")
