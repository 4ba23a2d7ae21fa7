"""A front-end process: serves HTTP at the supervisor's sockets, with engines in other processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping, Sequence

from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.metrics_socket import read_all, report
from bdh_batch.processes.model_settings import models_of
from bdh_batch.processes.recent_socket import answer, ask
from bdh_batch.processes.service import Service, run_until_signal
from bdh_batch.processes.supervised_models import SupervisedModels
from bdh_batch.processes.watch_socket import WatchSockets, show
from bdh_batch.settings import Settings
from bdh_batch.store.recent import Completion


async def run_front_end(
    settings: Settings,
    folder: RuntimeFolder,
    name: str,
    listeners: Sequence[socket.socket],
    on_ready: Callable[[str, str], None],
    accepts_early: bool,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        name: of this process; the others find its metrics by it.
        accepts_early: see `Service`.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """
    folder.forget(name)
    models = models_of(settings)
    label = models[0].name if len(models) == 1 else ""
    # The path of a Unix socket is the supervisor's to remove.
    server = settings.server.model_copy(update={"uds": None})
    service = Service(
        settings.model_copy(update={"server": server}),
        lambda metrics, _: SupervisedModels(models, folder, metrics),
        label,
        on_ready,
        listeners,
        accepts_early,
    )

    async def others() -> Mapping[str, bytes]:
        """Returns the metrics of the engines and of the other front ends."""
        return await read_all({other: path for other, path in folder.reporting().items() if other != name})

    async def asked(owner: str, id: str) -> Completion | None:
        """Returns what another front end remembers."""
        return await ask([path for path in folder.path.glob("*.recent") if path != folder.recent(name)], owner, id)

    service.metrics.join(name, others)
    service.metrics.watched.join(name, WatchSockets(folder, name))
    service.recent.join(asked)
    reporting = await report(service.metrics.exposition, folder.metrics(name))
    answering = await answer(service.recent, folder.recent(name))
    showing = await show(service.metrics.watched, folder.watch(name))
    try:
        await run_until_signal(service)
    finally:
        reporting.close()
        answering.close()
        showing.close()
