"""The engines in other processes, which a front end looks for: by their sockets in the runtime folder, or elsewhere."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence

from bdh_batch import __version__
from bdh_batch.backends.address import Address
from bdh_batch.backends.remote import RemoteBackend
from bdh_batch.backends.replica import Reader, Replica, State
from bdh_batch.backends.wire import Welcome
from bdh_batch.processes.components import Components
from bdh_batch.processes.engines import EngineInfo
from bdh_batch.settings import Settings

log = logging.getLogger(__name__)

LOST, REPLACED = "lost", "replaced"  # what becomes of an engine
LOOK_SECONDS = 0.1  # between two looks at which engines there are


class RemoteEngines:
    """Connects to the engine processes of one model.

    Args:
        model: its name.
        find: returns the addresses of all engines, by the engines' names. It may raise OSError.
        secret: by which they know their front ends.
        on_failover: is called with what became of an engine, and how many streams go to another one.
    """

    compiles_grammars = True

    def __init__(
        self,
        settings: Settings,
        model: str,
        find: Callable[[], Mapping[str, Address]],
        secret: str,
        on_failover: Callable[[str, int], None],
    ) -> None:
        self._settings = settings
        self._model = model
        self._on_failover = on_failover
        for reason in (LOST, REPLACED):
            on_failover(reason, 0)  # so that the first one is an increase
        self._find = find
        self._secret = secret
        self._replicas: dict[str, Replica] = {}
        self._welcome: Welcome | None = None  # of the first one: all others have to compute the same
        self._known = asyncio.Event()
        self._backend: RemoteBackend | None = None
        self._looking: asyncio.Task[None] | None = None

    async def load(self) -> EngineInfo:
        self._looking = asyncio.create_task(self._look())
        await self._known.wait()
        assert self._welcome is not None
        found = self._welcome
        sizes = (found.vocab_size, found.width, found.slots, found.host_slots, found.window)
        return EngineInfo(*sizes, found.fingerprint, found.layout, found.latent_steps)

    def open(self, components: Components) -> RemoteBackend:
        assert self._welcome is not None
        backend = RemoteBackend(
            components.text.tokenizer,
            self._welcome.vocab_size,
            self._settings.engine.max_failovers,
            self._settings.scheduler.request_timeout,
        )
        backend.replicas = self._replicas
        self._backend = backend
        return backend

    def states(self) -> Sequence[Mapping[str, object]]:
        return [
            {
                "name": name,
                **self._facts(replica.welcome),
                "state": replica.state.value,
                "streams": len(replica.readers),
            }
            for name, replica in self._replicas.items()
        ]

    def _facts(self, welcome: Welcome | None) -> Mapping[str, object]:
        """What an engine said when it was last connected to; before that, what the settings say."""
        if welcome is not None:
            return {"pid": welcome.pid, "model": welcome.model, "device": welcome.device}
        return {"pid": None, "model": self._model, "device": _device(self._settings)}

    def close(self) -> None:
        """Closes all connections. Idempotent."""
        if self._looking is not None:
            self._looking.cancel()
        for replica in self._replicas.values():
            replica.close()

    async def _look(self) -> None:
        """Connects to new engines, and forgets those that have gone."""
        while True:
            try:
                found = self._find()
            except OSError as error:  # no descriptor is left: looked for once more
                log.warning("the engines cannot be listed: %s", error)
                found = {name: replica.address for name, replica in self._replicas.items()}
            for name, address in found.items():
                if name not in self._replicas:
                    self._replicas[name] = self._connect(address)
            for name in self._replicas.keys() - found.keys():
                with contextlib.suppress(KeyError):
                    self._replicas.pop(name).leave()
            await asyncio.sleep(LOOK_SECONDS)

    def _connect(self, address: Address) -> Replica:
        heartbeat = self._settings.engine.heartbeat_seconds
        return Replica(address, __version__, self._secret, heartbeat, self._changed, self._on_lost, self._fits)

    def _fits(self, welcome: Welcome) -> str | None:
        """Returns why an engine cannot be used beside the first one, or None if it can."""
        if self._welcome is None:
            self._welcome = welcome
            self._known.set()
        if welcome.fingerprint != self._welcome.fingerprint:
            return "its weights, dtypes or kernels differ from those of the first engine"
        return None

    def _on_lost(self, replica: Replica, readers: Sequence[Reader]) -> None:
        self._on_failover(REPLACED if replica.state is State.LEAVING else LOST, len(readers))
        if self._backend is not None:
            self._backend.lost(replica, readers)

    def _changed(self, replica: Replica) -> None:
        if self._backend is not None:
            self._backend.changed(replica)


def _device(settings: Settings) -> str | None:
    """Returns the kind of device that all engines of a model have by its settings; None where they differ."""
    kinds = {device.partition(":")[0] for device in settings.engine.devices} or {settings.model.device}
    return kinds.pop() if len(kinds) == 1 else None
