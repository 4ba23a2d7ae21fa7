"""What `bdh-batch serve` runs in this process: the whole server, its supervisor, or a child of that.

Only what computes or answers imports torch and the rest of the server: a supervisor stays small.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from bdh_batch.processes import supervisor
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.settings import Settings

if TYPE_CHECKING:
    from bdh_batch.processes.engines import LoadEngine, StartEngine


async def run(
    settings: Settings,
    arguments: Sequence[str],
    child: str | None,
    announce: Callable[[str, str], None],
    load: LoadEngine | None = None,
    program: Sequence[str] = ("bdh_batch",),
) -> None:
    """Serves as the settings say, until a signal.

    Args:
        arguments: of the command line.
        child: which process of a supervisor this one is, in its words; None is none.
        announce: is given the base URL and the model's name; in a process of an engine, when that is ready.
        load: makes an engine; None is `engine.loading.load_engine`.
        program: the module that children are started as, and what goes before the arguments.

    Raises:
        ConfigError, CheckpointError: it cannot start.
    """
    if child is not None:
        await _run_child(settings, Place.of(child), announce, load)
    elif supervisor.is_wanted(settings):
        await supervisor.Supervisor(settings, [*program, *arguments], announce).run()
    else:
        await serve(settings, announce, load)


@dataclass(frozen=True, slots=True)
class Place:
    """What a supervisor has told a child: its name, and what it has handed over."""

    name: str
    folder: RuntimeFolder
    life: int  # file descriptor, which ends when the supervisor does
    tells: int  # file descriptor, to say at that it is ready
    sockets: Sequence[int]

    @classmethod
    def of(cls, spec: str) -> Place:
        name, folder, life, tells, *sockets = spec.split(":")
        return cls(name, RuntimeFolder(Path(folder)), int(life), int(tells), [*map(int, sockets)])

    def ready(self) -> None:
        os.write(self.tells, b"1")
        os.close(self.tells)


async def _run_child(
    settings: Settings, place: Place, announce: Callable[[str, str], None], load: LoadEngine | None
) -> None:
    def ready() -> None:
        announce(place.name, "")
        place.ready()

    loop = asyncio.get_running_loop()
    loop.add_reader(place.life, _orphaned)
    if place.name.startswith("engine"):
        from bdh_batch.engine.loading import load_engine
        from bdh_batch.processes.engine_process import run_engine

        await run_engine(settings, place.folder, place.name, ready, load or load_engine)
    else:
        from bdh_batch.processes.front_end import run_front_end

        listeners = [socket.socket(fileno=number) for number in place.sockets]
        await run_front_end(settings, place.folder, place.name, listeners, lambda *_: place.ready())


def _orphaned() -> None:
    """The supervisor has gone: nobody would end this process, or start it again."""
    os.kill(os.getpid(), signal.SIGKILL)


async def serve(
    settings: Settings,
    on_ready: Callable[[str, str], None],
    load: LoadEngine | None = None,
    start: StartEngine | None = None,
) -> None:
    """Runs a server with its engine in this process until SIGTERM or SIGINT.

    Args:
        load: makes the engine, off the event loop; None is `engine.loading.load_engine`.
        start: has it compute, on the event loop; None is `engine.loading.start_worker`.
    """
    from bdh_batch.engine.loading import load_engine, start_worker
    from bdh_batch.processes.engines import LocalEngine
    from bdh_batch.processes.service import Service, run_until_signal

    engine = partial(LocalEngine, load=load or load_engine, start=start or start_worker)
    await run_until_signal(Service(settings, engine, on_ready))
