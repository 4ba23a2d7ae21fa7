"""Opens the file of the state that a turn may begin in, beside what else has to be prepared. Knows nothing of turns."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from typing import Any, Self

from bdh_batch.messages import SavedState

Opened = tuple[SavedState, Callable[[], object]]  # and what is to be called when it is not read any more


class Opening:
    """Owns the opening from its begin to its end: a context, which does not end before the opening has. So there is at
    most one of each request, also of one that is refused.

    Args:
        state: opens the file, as `Conversations.state` does; None where there is none to open.
        cleanup: is closed when the request has ended; closes the file that was taken.
    """

    def __init__(self, state: Coroutine[Any, Any, Opened | None] | None, cleanup: ExitStack) -> None:
        self._task = None if state is None else asyncio.create_task(state)
        self._cleanup = cleanup
        self._taken = False

    async def take(self) -> SavedState | None:
        """Returns the state, once it is open; None where there is none (any more). Raises NotFound."""
        if self._task is None or (found := await self._task) is None:
            return None
        self._taken = True
        state, close = found
        self._cleanup.callback(close)
        return state

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        """Closes the file, if it was not taken. Where this is cancelled, the file is closed all the same."""
        if self._task is not None and not self._taken:
            self._task.add_done_callback(_close)
            self._task.cancel()
            await asyncio.wait([self._task])


def _close(task: asyncio.Task[Opened | None]) -> None:
    if not task.cancelled() and task.exception() is None and (found := task.result()) is not None:
        _, close = found
        close()
