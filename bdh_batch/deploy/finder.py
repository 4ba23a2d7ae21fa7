"""A front end's view of which engines there are on the cluster."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path

from bdh_batch.backends.address import NetworkAddress
from bdh_batch.deploy.directory import Listed

log = logging.getLogger(__name__)

ABSENT_SECONDS = 10.0  # that an engine is kept when the directory has forgotten it: it may only have begun anew
RETRY_SECONDS = 1.0

# The directory's version, whether the server drains, and its engines.
Answer = tuple[str, bool, Sequence[Listed]]


class Finder:
    """Knows the engines that the directory had last.

    Where the directory cannot be reached, all engines stay: whether one lives is seen by its connection.

    Args:
        ask: waits until the directory has another version than the given one, and returns what it has.
        unreachable: what `ask` raises where the directory cannot be reached.
        on_drain: is called once the server drains.
    """

    def __init__(
        self,
        ask: Callable[[str], Awaitable[Answer]],
        unreachable: tuple[type[Exception], ...],
        on_drain: Callable[[], None],
    ) -> None:
        self._ask = ask
        self._unreachable = unreachable
        self._on_drain = on_drain
        self._known: dict[str, Listed] = {}
        self._absent: dict[str, float] = {}
        self._version = ""

    def addresses(self, model: int) -> Mapping[str, NetworkAddress]:
        """Returns the addresses of a model's engines, by the engines' names."""
        return {
            name: NetworkAddress(name, engine.host, engine.port, Path(engine.record))
            for name, engine in self._known.items()
            if engine.model == model
        }

    async def watch(self) -> None:
        """Keeps up to date until it is cancelled."""
        reachable = True
        while True:
            try:
                version, draining, engines = await self._ask(self._version)
            except self._unreachable as error:
                if reachable:
                    log.warning("which engines there are cannot be asked for: %s", error)
                reachable, self._version = False, ""
                await asyncio.sleep(RETRY_SECONDS)
                continue
            reachable, self._version = True, version
            self._take(engines, asyncio.get_running_loop().time())
            if draining:
                self._on_drain()

    def _take(self, engines: Sequence[Listed], now: float) -> None:
        found = {engine.name: engine for engine in engines}
        self._absent = {name: self._absent.get(name, now) for name in self._known.keys() - found.keys()}
        for name in [name for name, since in self._absent.items() if now - since >= ABSENT_SECONDS]:
            del self._known[name], self._absent[name]
        self._known |= found
