"""One completion's way through a compiled grammar, token by token.

Where a completion may end, but could go on, a model that has an end-of-text token decides by drawing it. One that has
none draws among all its tokens there: what the grammar cannot take says that the completion has ended before it. So a
completion of `[0-9]+` goes on for as long as the model would write digits anyway, and is complete in any case. Where a
completion may not end early, it goes on as long as it can.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

from llguidance import LLMatcher

from bdh_batch.errors import InvalidRequest
from bdh_batch.messages import Constraint
from bdh_batch.system.threads import Executor
from bdh_batch.text.compiler import reason
from bdh_batch.text.vocabulary import Vocabulary


class CompiledGrammar:
    """Constraints of one grammar share what was compiled, and what they learn of it.

    Args:
        worn_out: is called, in the engine's thread, once what they share has reached a limit of the library's: every
            other constraint of it fails from then on.
        warnings: what was left out of its schemas, which responses may not keep to.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        param: str,
        trigger: str = "",
        maskers: Executor | None = None,
        worn_out: Callable[[], object] = lambda: None,
        warnings: Sequence[Mapping[str, str]] = (),
    ) -> None:
        self.warnings = warnings
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._worn_out = worn_out
        self._param = param
        self._trigger = trigger
        self._maskers = maskers

    def constraint(self, early: float = 0) -> Constraint:
        return TriggeredConstraint(self, self._trigger, early) if self._trigger else self.walk(early)

    def walk(self, early: float) -> GrammarConstraint:
        matcher = self._matcher.deep_copy()
        return GrammarConstraint(matcher, self._vocabulary, self._param, early, self._maskers, self._worn_out)

    def text(self, token: int) -> bytes:
        return self._vocabulary.text(token)

    def tokens(self, text: bytes) -> list[int]:
        return self._vocabulary.tokens.tokenize_bytes(text) if text else []


class GrammarConstraint:
    """One completion's way through a grammar.

    Args:
        early: tokens before which the response does not end as long as it can go on.
        maskers: makes the masks, each from the moment on at which the token before it is known; None makes them where
            they are asked for.
    """

    def __init__(
        self,
        matcher: LLMatcher,
        vocabulary: Vocabulary,
        param: str,
        early: float = 0,
        maskers: Executor | None = None,
        worn_out: Callable[[], object] = lambda: None,
    ) -> None:
        self.complete = False
        self._worn_out = worn_out
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._param = param
        self._early = early
        self._maskers = maskers
        self._bits: bytes | None = None  # what is allowed next, once it is known
        self._coming: Future[bytes] | None = None
        self._look_ahead()

    def mask(self) -> bytes | None:
        try:
            bits = self._allowed()
        except Exception:  # noqa: BLE001 - `accept` meets it again, and there it ends no more than this response
            return None
        return None if self._may_end_anywhere() else bits

    def accept(self, token: int) -> bool:
        bits = self._allowed()
        allowed = token < 8 * len(bits) and bits[token >> 3] >> (token & 7) & 1
        if self._may_end_anywhere() and not (allowed and token != self._vocabulary.tokens.eos_token):
            return False
        if not (allowed and self._matcher.consume_token(token)):
            if self._matcher.is_error():  # an allowed token, and a limit all the same
                self._worn_out()
            why = reason(self._matcher) or "no token can follow"
            raise InvalidRequest(f"{self._param}: The completion cannot go on in this grammar ({why}).", self._param)
        self._early -= 1
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()
        self._look_ahead()
        return True

    def accept_all(self, tokens: Sequence[int]) -> bool:
        """Takes `tokens` if the grammar can; else this constraint is of no further use."""
        for token in tokens:
            if not self._matcher.consume_token(token):
                return False
        self.complete = self._matcher.is_stopped()
        self._look_ahead()
        return True

    def _look_ahead(self) -> None:
        self._bits = None
        if self._maskers is not None and not self.complete:
            self._coming = self._maskers.submit(self._matcher.compute_bitmask)

    def _allowed(self) -> bytes:
        if self._bits is None:
            bits = self._matcher.compute_bitmask() if self._coming is None else self._coming.result()
            early = self._early > 0 and self._matcher.is_accepting()
            self._bits = self._vocabulary.without_ends(bits) if early else bits
        return self._bits

    def _may_end_anywhere(self) -> bool:
        """Whether the response may end here, and no token says so: the model has none, or none may come yet."""
        if not self._matcher.is_accepting():
            return False
        return not any(self._allowed()) if self._early > 0 else not self._vocabulary.ends


class TriggeredConstraint:
    """Any text, until the trigger has been said; then the grammar."""

    def __init__(self, grammar: CompiledGrammar, trigger: str, early: float) -> None:
        self._grammar = grammar
        self._early = early
        self._trigger = trigger.encode()
        self._said = b""  # the end of the text, as far as it may be a prefix of the trigger
        self._inner: GrammarConstraint | None = None

    @property
    def complete(self) -> bool:
        return self._inner is not None and self._inner.complete

    def mask(self) -> bytes | None:
        return None if self._inner is None else self._inner.mask()

    def accept(self, token: int) -> bool:
        if self._inner is not None:
            return self._inner.accept(token)
        self._early -= 1
        said, trigger, rest = (self._said + self._grammar.text(token)).partition(self._trigger)
        self._said = (said + trigger + rest)[1 - len(self._trigger) :]
        if trigger:
            inner = self._grammar.walk(self._early)
            # A token may go on past the trigger. If it does so otherwise than a call would, none is meant.
            if inner.accept_all(self._grammar.tokens(rest)):
                self._inner = inner
        return True
