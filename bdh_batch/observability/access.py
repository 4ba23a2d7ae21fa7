"""The access log: an event for each request once it has ended, with whose it was, what it took and how long.

It says which endpoint was asked, not which path: no text and no key of a client's gets into it. Over both protocols,
HTTP and gRPC, and the response to a request that goes on in the background has an event of its own.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Protocol

from bdh_batch.messages import Delta, FinishReason, Usage
from bdh_batch.observability.logs import ACCESS

log = logging.getLogger(ACCESS)


class HasUsage(Protocol):
    """A generation, as far as its tokens are counted here."""

    def usage(self, completion_tokens: int) -> Usage: ...


class Failed(Protocol):
    """What has ended, and perhaps by an error."""

    @property
    def error(self) -> BaseException | None: ...


def cause(ended: Failed) -> str:
    """Why something ended that did not end well: the kind of its error, or that it was aborted."""
    return FinishReason.ABORT.value if ended.error is None else type(ended.error).__name__


@dataclass(slots=True)
class Account:
    """What one request has taken, filled in as that becomes known.

    Args:
        id: of the request.
        tenant: the label of its caller: of a key, or of an address; neither of them.
        model: the name of the model that it uses.
    """

    id: str = ""
    tenant: str = ""
    model: str | None = None
    _began: float = field(default_factory=time.perf_counter)
    _first_byte: float | None = None
    _usage: Usage | None = None
    _error: str | None = None
    _ended: bool = False

    @property
    def seconds(self) -> float:
        """Seconds since the request came."""
        return time.perf_counter() - self._began

    def responding(self) -> None:
        """The response begins, a stream with its first token."""
        self._first_byte = self.seconds

    def generated(self, generation: HasUsage, tokens: int, failure: Delta | None) -> None:
        """Counts a generation that has ended, as `Generation.on_end` has it."""
        more = generation.usage(tokens)
        self._usage = more if self._usage is None else _sum(self._usage, more)
        if failure is not None:
            self._error = self._error or cause(failure)
        if self._ended:
            self._log(logging.INFO, "in the background", {"background": True})

    def end(self, method: str, route: str, status: int, level: int = logging.INFO) -> None:
        """Logs the request, which has had its response.

        Args:
            route: the endpoint that was asked, without what clients write into its path.
            status: of the response, as HTTP has them, whatever the protocol.
        """
        self._ended = True
        self._log(level, f"{method} {route}: {status}", {"method": method, "route": route, "status": status})

    def _log(self, level: int, what: str, facts: dict[str, object]) -> None:
        if not log.isEnabledFor(level):
            return
        seconds, usage = self.seconds, self._usage
        fields = {"request_id": self.id, "tenant": self.tenant, "model": self.model, **facts}
        fields |= {"seconds": round(seconds, 6), "error": self._error}
        if self._first_byte is not None:
            fields["first_byte_seconds"] = round(self._first_byte, 6)
        tokens = ""
        if usage is not None:
            tokens = f", {usage.prompt_tokens} + {usage.completion_tokens} tokens"
            fields |= {"prompt_tokens": usage.prompt_tokens, "cached_tokens": usage.cached_tokens}
            fields |= {"completion_tokens": usage.completion_tokens, "reasoning_tokens": usage.reasoning_tokens}
        known = {name: value for name, value in fields.items() if value is not None}
        text = "request %s of %s: %s in %.3f s%s"
        log.log(level, text, self.id, self.tenant, what, seconds, tokens, extra={"fields": known})


def _sum(one: Usage, other: Usage) -> Usage:
    reasoning = [each.reasoning_tokens for each in (one, other) if each.reasoning_tokens is not None]
    return Usage(
        one.prompt_tokens + other.prompt_tokens,
        one.completion_tokens + other.completion_tokens,
        one.cached_tokens + other.cached_tokens,
        one.estimated or other.estimated,
        sum(reasoning) if reasoning else None,
    )
