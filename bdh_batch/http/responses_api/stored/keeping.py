"""Stores one response: as it goes on, where it is in the background, and at its end with what the next turn needs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from bdh_batch.backends.base import Backend
from bdh_batch.http.request.off_loop import Aside
from bdh_batch.http.responses_api.frames import ResponseFrames
from bdh_batch.http.responses_api.stored.records import UNFINISHED, Conversations, Item, Stored
from bdh_batch.http.responses_api.stored.saving import Saving
from bdh_batch.http.responses_api.stored.transcript import Transcript


@dataclass(frozen=True, slots=True)
class Keeping:
    """
    Args:
        items: that the response is made of, those of the turns before it included.
        size: bytes of them and of the request.
        saving: writes its state; None where that is not to be stored.
        aside: where what takes long is done.
        background: whether it has been stored before its end.
    """

    conversations: Conversations
    transcript: Transcript
    backend: Backend
    owner: str
    items: Sequence[Item]
    size: int
    saving: Saving | None
    aside: Aside
    background: bool

    async def begin(self, frames: ResponseFrames) -> bool:
        """Stores one that has not ended. Returns whether that went well, as all of these do."""
        return await self._put(self._unfinished(frames), frames, new=True)

    async def go_on(self, frames: ResponseFrames) -> bool:
        """Stores it as it is now, or as it has failed, unless it has been deleted."""
        return await self._put(self._unfinished(frames), frames, new=False)

    async def end(self, frames: ResponseFrames) -> bool:
        """Stores it when it has ended well; with its state, as soon as that is written."""
        size, response = self.size + frames.size, frames.response | {"store": True}
        ended = (response, self.items, frames.text.getvalue(), frames.tokens, self.backend)
        value = await self.aside.run(size, self.transcript.stored, *ended)
        if self.saving is not None:
            value = replace(value, expected=time.time(), saver=self.conversations.store.process)
        done = await self._put(value, frames, new=not self.background)
        if self.saving is not None:
            if done:
                self.conversations.adopt(self.saving, value, self.owner, self.aside.of_nobody())
            else:
                self.saving.drop()
        return done

    def _unfinished(self, frames: ResponseFrames) -> Stored:
        process = self.conversations.store.process if frames.response["status"] in UNFINISHED else None
        return Stored(frames.response | {"store": True}, self.items, process=process)

    async def _put(self, value: Stored, frames: ResponseFrames, new: bool) -> bool:
        return await self.conversations.put(value, self.owner, self.aside, self.size + frames.size, new)
