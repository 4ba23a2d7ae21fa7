"""Starts generations for a caller: as many tokens as it may have, in its share of the machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from starlette.requests import Request

from bdh_batch.backends.base import Backend, Generation
from bdh_batch.errors import ContextLengthExceeded
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.auth.rates import Rates
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

    async def start(self, request: Request, backend: Backend, requests: Sequence[GenerationRequest]) -> Generation:
        """Starts all of `requests` for the caller of `request`, or none.

        Raises:
            InvalidRequest: a prompt that cannot be served, or more than the caller may ever have.
            Forbidden: a priority that is not the caller's to give.
            RateLimited, QueueFull, Unavailable: not now.
        """
        caller: Caller = request.state.caller
        caller.check_priority(requests[0].priority, self._top_priority)
        mine = [
            replace(each, cache_namespace=caller.namespace, tenant=caller.label, weight=caller.weight)
            for each in await backend.tokenized(requests)
        ]
        self._check_lengths(mine)
        prompts = sum(len(each.tokens) for each in mine[:: mine[0].n])  # a prompt counts once, as in `usage`
        most = prompts + sum(each.max_tokens for each in mine)
        param = mine[0].prompt_param if mine[0].pool else mine[0].max_tokens_param or "max_tokens"
        reservation = await self._rates.reserve(caller, most, request.state.standing, param)
        if reservation is None:
            return await backend.generate(mine)
        try:
            generation = await backend.generate(mine)
        except BaseException:
            self._rates.settle(reservation, 0)
            raise
        generation.on_end(lambda tokens, _: self._rates.settle(reservation, prompts + tokens))
        return generation

    def _check_lengths(self, requests: Sequence[GenerationRequest]) -> None:
        most = self._max_prompt_tokens
        for each in requests:
            if most is not None and len(each.tokens) > most:
                text = f"The prompt has {len(each.tokens)} tokens; the limit is {most} (limits.max_prompt_tokens)."
                raise ContextLengthExceeded(text, each.prompt_param)
