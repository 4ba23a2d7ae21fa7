"""Responses whose states are saved: clients do not wait until the files are written."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

from bdh_batch.backends.base import Ended, Generation
from bdh_batch.errors import BDHError
from bdh_batch.messages import Delta, FinishReason, SavedState, Usage
from bdh_batch.store.record import Record
from bdh_batch.store.records import NewState, Store

SAVE_SECONDS = 60.0  # in which a state is written
KEEP_SECONDS = 5.0  # from the end of a response until it is stored
COMPLETE = (FinishReason.STOP, FinishReason.LENGTH, FinishReason.TOOL_CALLS)


class Saving:
    """A generation whose state is written to a file. Its reader is done when its sequence has ended.

    Args:
        generation: of one sequence, with `save_to`.
        new: where its state is written.
    """

    def __init__(self, generation: Generation, new: NewState, store: Store) -> None:
        self._generation = generation
        self._deltas = aiter(generation)
        self._new = new
        self._store = store
        self._saved: SavedState | None = None
        self._problem = "its engine says nothing of it"  # where it is not written
        self._ended = False  # well
        self._kept = self._dropped = False
        self._decision: asyncio.TimerHandle | None = None

    @property
    def prompts(self) -> Sequence[Sequence[int]]:
        return self._generation.prompts

    @property
    def cached_tokens(self) -> Sequence[int]:
        return self._generation.cached_tokens

    async def __aiter__(self) -> AsyncIterator[list[tuple[int, Delta]]]:
        async for deltas in self._deltas:
            self._look(deltas)
            yield deltas
            if any(delta.finish_reason is not None for _, delta in deltas):
                return

    def usage(self, completion_tokens: int) -> Usage:
        return self._generation.usage(completion_tokens)

    def on_end(self, ended: Ended) -> None:
        self._generation.on_end(ended)

    def abort(self) -> None:
        """Where its sequence has ended well, somebody may still `keep` it; else the file is of no use."""
        if not self._ended:
            self.drop()
        elif self._decision is None:
            self._decision = asyncio.get_running_loop().call_later(KEEP_SECONDS, self.drop)

    def keep(self) -> bool:
        """From now on `saved` is awaited, and nothing else ends it. False where it has been dropped."""
        if self._decision is not None:
            self._decision.cancel()
        self._kept = not self._dropped
        return self._kept

    def drop(self) -> None:
        """The file is of no use. It may be on its way, and come yet. Idempotent."""
        if not (self._kept or self._dropped):
            self._dropped = True
            self._generation.abort()
            self.discard()
            asyncio.get_running_loop().call_later(SAVE_SECONDS, self.discard)

    async def saved(self) -> SavedState | None:
        """What was written, once it is; None where it could not be, which is counted. Ends the generation."""
        try:
            async with asyncio.timeout(SAVE_SECONDS):
                async for deltas in self._deltas:
                    self._look(deltas)
        except TimeoutError:  # it may come yet
            self._problem = f"it takes longer than {SAVE_SECONDS:g} s"
            asyncio.get_running_loop().call_later(SAVE_SECONDS, self.discard)
        finally:
            self._generation.abort()
        if self._saved is None:
            self._store.not_saved(self._problem)
        return self._saved

    async def adopt(self, record: Record) -> None:
        """Makes the file the state of a record that has been put. Where that fails, which the store counts, the record
        has none."""
        with contextlib.suppress(BDHError):
            await self._store.adopt(self._new.id, record)

    def discard(self) -> None:
        """Removes the file."""
        self._store.discard(self._new.id)

    def _look(self, deltas: Sequence[tuple[int, Delta]]) -> None:
        for _, delta in deltas:
            self._ended = self._ended or delta.finish_reason in COMPLETE
            self._saved = delta.saved or self._saved
            self._problem = delta.save_error or self._problem
