"""A backend that generates with engines in other processes, and resumes streams on another one when one is lost.

A token is determined by the weights, the prompt, the tokens before it and the seed. So any engine with the same
weights and kernels can resume a stream: its reader sees a pause, and the same bytes. The engine that resumes it gets
the tokens so far, and computes their state as it does that of a prompt.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping, Sequence

from bdh_batch.backends.base import RawPrompt
from bdh_batch.backends.failover import Failover
from bdh_batch.backends.generation import MailboxGeneration, Running
from bdh_batch.backends.replica import Reader, Replica, State
from bdh_batch.backends.routing import Routing
from bdh_batch.backends.stream import RemoteStream
from bdh_batch.backends.tokenization import Tokenization
from bdh_batch.engine.mailbox import Deliveries, Mailbox
from bdh_batch.errors import Unavailable
from bdh_batch.messages import GenerationRequest, Prompt, Text
from bdh_batch.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)

LAST_WORDS_SECONDS = 2.0  # for the error events of a drain that ran out of time to reach their clients
NO_ENGINE, ALL_BEHIND = "no engine is ready", "no engine reads what it is sent"


class RemoteBackend:
    """Generates with engines in other processes.

    Args:
        max_failovers: engines that one request may lose; then it fails, as it may be what crashes them.
        timeout: seconds that a request may take in all; None is no limit.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        max_failovers: int,
        timeout: float | None,
    ) -> None:
        self.replicas: Mapping[str, Replica] = {}
        self._tokenization = Tokenization(tokenizer, vocab_size)
        self._timeout = timeout
        self._running = Running()
        self._deliveries = Deliveries()
        self._failover = Failover(max_failovers, self._ready, Routing(random.Random()).choose)

    async def generate(self, request: GenerationRequest) -> MailboxGeneration:
        if (problem := self.ready()) is not None:
            raise Unavailable(f"The model is not available: {problem}.", retry_after=1)
        timeout = request.origin.timeout_within(self._timeout)
        deadline = None if timeout is None else time.monotonic() + timeout
        mailbox = Mailbox(self._deliveries)
        stream = RemoteStream(request, mailbox, self._failover, deadline)
        self._running.add(stream)
        try:
            self._failover.add(stream)
            await asyncio.shield(stream.admitted)
            return MailboxGeneration(request, mailbox, stream, self._running)
        except BaseException:
            stream.abandon()
            raise
        finally:
            self._running.discard(stream)  # when the generation counts already: a drain must not see a gap

    @property
    def engines(self) -> int:
        return len(self.replicas)

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenization.tokenizer

    async def tokenized(self, prompts: Sequence[RawPrompt], last: int | None = None) -> list[Prompt]:
        return await self._tokenization.prompts(prompts, last)

    async def tokenize(self, prompt: Text, param: str) -> Sequence[int]:
        return await self._tokenization.tokenize(prompt, param)

    async def detokenize(self, tokens: Sequence[int]) -> str:
        return await self._tokenization.detokenize(tokens)

    def load(self) -> int:
        return len(self._running)

    def health(self) -> str | None:
        return None  # an engine that is lost is no fault of this process

    def ready(self) -> str | None:
        if self._ready():
            return None
        return ALL_BEHIND if any(each.state is State.READY for each in self.replicas.values()) else NO_ENGINE

    async def drain(self, seconds: float) -> None:
        if await self._running.wait_until_idle(seconds):
            return
        for stream in self._streams():
            stream.fail(Unavailable("The server is shutting down.", retry_after=5))
        await self._running.wait_until_idle(LAST_WORDS_SECONDS)

    def close(self) -> None:
        """Whoever has connected the replicas closes them."""

    def changed(self, replica: Replica) -> None:
        """Dispatches waiting streams, as the state of a replica has changed."""
        self._failover.dispatch()

    def lost(self, replica: Replica, readers: Sequence[Reader]) -> None:
        """Moves the streams of `readers` to other replicas, as this one will not finish them."""
        self._failover.lost(replica, [each for each in readers if isinstance(each, RemoteStream)])

    def _ready(self) -> list[Replica]:
        return [replica for replica in self.replicas.values() if replica.accepts]

    def _streams(self) -> list[RemoteStream]:
        found = {id(reader): reader for replica in self.replicas.values() for reader in replica.readers.values()}
        computed = [each for each in found.values() if isinstance(each, RemoteStream)]
        return [*computed, *self._failover.waiting]
