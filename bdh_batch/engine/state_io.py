"""Reads states from files to transfer slots, and writes them from there to files, on threads of its own."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from bdh_batch.engine.state_files import NOTHING, BadState, Interrupted, read_state, write_state
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.engine.state_traffic import INTERRUPTED, Done
from bdh_batch.messages import StateLayout
from bdh_batch.scheduler.copies import Save
from bdh_batch.scheduler.transfers import Load
from bdh_batch.system.threads import DaemonThreads, Executor

log = logging.getLogger(__name__)

THREADS = 2  # a state that is read need not wait for one that is written; where none is, both read it


class StateIO:
    """Moves states between files and the transfer slots of a pool. It is called in the worker's thread; one of its own
    threads that reads a state has the other one help, if that is free.

    Args:
        layout: of the states in `pool`.
    """

    def __init__(self, pool: StatePool, layout: StateLayout) -> None:
        self.layout = layout
        self._pool = pool
        self._threads = DaemonThreads(THREADS, "bdh-states")

    @property
    def slots(self) -> int:
        """How many states can be on their way at a time."""
        return self._pool.transfer_slots

    def back(self, slot: int) -> None:
        """Has the system give a slot its memory, before a step has to wait for it."""
        self._threads.submit(self._pool.back, slot)

    def read(self, load: Load, done: Done) -> None:
        self._threads.submit(self._read, load, self._pool.copies_made(), done, self._threads)

    def read_ahead(self, load: Load, done: Done, goes_on: Callable[[], bool]) -> None:
        """Reads a state that nobody waits for, with one thread, for as long as it `goes_on`."""
        self._threads.submit(self._read, load, self._pool.copies_made(), done, None, goes_on)

    def write(self, save: Save, done: Done) -> None:
        self._threads.submit(self._write, save, self._pool.copies_made(), done)

    def _memory(self, slot: int) -> tuple[memoryview, memoryview]:
        """The bytes of a state, and those of its hidden vector."""
        vectors = self._pool.vectors
        return self._pool.memory(slot), NOTHING if vectors is None else vectors.memory(slot)

    def _read(
        self,
        load: Load,
        copies_made: Callable[[], object],
        done: Done,
        helper: Executor | None,
        goes_on: Callable[[], bool] = lambda: True,
    ) -> None:
        error: str | None = "it could not be read."
        try:
            copies_made()
            memory, hidden = self._memory(load.slot)
            read_state(Path(load.state.path), self.layout, load.tokens, memory, hidden, helper, goes_on)
            error = None
        except Interrupted:
            error = INTERRUPTED
        except BadState as bad:
            error = str(bad)
        except OSError as failure:
            error = f"its file cannot be read ({failure.strerror})."
        except Exception:  # the sequences that wait for it have to be notified in any case
            log.exception("a state could not be read")
        finally:
            done(error)

    def _write(self, save: Save, copies_made: Callable[[], object], done: Done) -> None:
        error: str | None = "The state could not be written."
        try:
            copies_made()
            write_state(Path(save.state.path), self.layout, save.tokens, *self._memory(save.slot))
            error = None
        except BadState as bad:
            error = f"The state cannot be saved: {bad}"
        except OSError as failure:
            error = f"The state could not be written ({failure.strerror})."
        except Exception:  # the response's reader waits to be notified
            log.exception("a state could not be written")
        finally:
            done(error)
