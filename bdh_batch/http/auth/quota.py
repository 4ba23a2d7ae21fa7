"""Starts generations for a caller: as many tokens as it may have, in its share of the machine."""

from __future__ import annotations

from bdh_batch.backends.base import Backend, Generation
from bdh_batch.errors import ContextLengthExceeded
from bdh_batch.http.auth.rates import Rates
from bdh_batch.http.request.client import Client
from bdh_batch.messages import GenerationRequest


class Quota:
    """Starts generations within a caller's limits.

    Args:
        max_prompt_tokens: of each prompt; None is no limit but the model's.
        top_priority: the lowest `priority` of requests whose key has no `top_priority`.
    """

    def __init__(self, rates: Rates, max_prompt_tokens: int | None, top_priority: int = 0) -> None:
        self._rates = rates
        self._max_prompt_tokens = max_prompt_tokens
        self._top_priority = top_priority

    def check(self, client: Client, prepared: GenerationRequest) -> None:
        """Checks what `client` may ask for at any time.

        Raises:
            InvalidRequest: a prompt is too long.
            Forbidden: a priority that is not the caller's to give.
        """
        client.caller.check_priority(prepared.priority, self._top_priority)
        self._check_lengths(prepared)

    async def start(self, client: Client, backend: Backend, prepared: GenerationRequest) -> Generation:
        """Starts what `client` asks for, and `check` has allowed.

        Raises:
            InvalidRequest: a prompt that cannot be served, or more than the caller may ever have.
            RateLimited, QueueFull, Unavailable: not now.
        """
        param = prepared.prompts[0].param if prepared.sampling is None else prepared.max_tokens_param or "max_tokens"
        reservation = await self._rates.reserve(client.caller, prepared.most_tokens, client.standing, param)
        if reservation is None:
            return await backend.generate(prepared)
        try:
            generation = await backend.generate(prepared)
        except BaseException:
            self._rates.settle(reservation, 0)
            raise
        known = prepared.prompt_tokens + (prepared.reasoning_tokens or 0)
        generation.on_end(lambda tokens, _: self._rates.settle(reservation, known + tokens))
        return generation

    def _check_lengths(self, prepared: GenerationRequest) -> None:
        most = self._max_prompt_tokens
        for prompt in prepared.prompts:
            if most is not None and len(prompt.tokens) > most:
                text = f"The prompt has {len(prompt.tokens)} tokens; the limit is {most} (limits.max_prompt_tokens)."
                raise ContextLengthExceeded(text, prompt.param)
