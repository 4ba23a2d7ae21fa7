"""A front-end process: serves HTTP at the supervisor's sockets, with engines in other processes."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence

from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.model_settings import models_of
from bdh_batch.processes.others import EVENTS, Others, answers_of, answers_of_front_end
from bdh_batch.processes.questions import answer
from bdh_batch.processes.service import Service, run_until_signal
from bdh_batch.processes.supervised_models import SupervisedModels
from bdh_batch.settings import Settings


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
        name: of this process; the others find its socket by it.
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

    others = Others(folder, name)
    service.metrics.join(name, others.metrics)
    service.metrics.watched.join(name, others)
    service.recent.join(others.completion)
    service.events.join(others)
    answers = answers_of(service.metrics.exposition, service.metrics.watched)
    answers |= answers_of_front_end(service.recent, service.events)
    answering = await answer(folder.questions(name), answers, patient=[EVENTS])
    try:
        await run_until_signal(service)
    finally:
        answering.close()
