"""Grammars that answers have to follow: compiled by llguidance off the event loop, kept, and walked token by token.

Where an answer may end, but could go on, a model that has an end-of-text token decides by drawing it. One that has none
draws among all its tokens there: what the grammar cannot take says that the answer has ended before it. So an answer
to `[0-9]+` goes on for as long as the model would write digits anyway, and is complete in any case. Where an answer may
not end early, it goes on as long as it can.
"""

from __future__ import annotations

import asyncio
import re
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from bdh_batch.errors import InvalidRequest, QueueFull, UnsupportedParameter
from bdh_batch.messages import Constraint
from bdh_batch.text.vocabulary import Vocabulary

COMPILERS = 2  # threads; a grammar takes milliseconds, a vast one a second
MASKERS = 2  # threads
SMALL = 4096  # tokens: a mask over so few is made sooner than it is handed to another thread
KEPT = 64  # compiled grammars
MESSAGE = 400  # characters of llguidance's that a client is shown

_FOR_AUTHORS = re.compile(r"\n<|\n *\d+ \| ")

# What one grammar may cost to compile, and each of its tokens; about a second, and a few milliseconds.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=50_000,
    max_grammar_size=300_000,
    verbose_errors=False,
)


@dataclass(frozen=True, slots=True)
class Source:
    """A grammar in llguidance's form, and the field of the request that it comes from.

    What is wrong with one of its `parts` is told in that part's name. With a `trigger`, text is free until that has
    been said, and then follows the grammar.
    """

    grammar: str
    param: str
    parts: Sequence[Source] = ()
    trigger: str = ""


class _Job:
    """A grammar on its way through the compilers; what comes of it is a matcher, or what is wrong with the grammar."""

    started = False
    outcome: asyncio.Future[LLMatcher | str]


class Grammars:
    """Compiles grammars for a vocabulary, and keeps them.

    Args:
        vocabulary: a reason why there is none refuses every grammar.
        most_bytes: of a grammar as llguidance reads it.
        seconds: how long one may take to compile.
        most_waiting: grammars that may wait for their turn.
        small: vocabularies larger than that have their masks made in other threads.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | str,
        most_bytes: int = 2**16,
        seconds: float = 10.0,
        most_waiting: int = 64,
        small: int = SMALL,
    ) -> None:
        self._vocabulary = vocabulary
        self._most_bytes = most_bytes
        self._seconds = seconds
        self._most_waiting = most_waiting
        self._jobs: OrderedDict[str, _Job] = OrderedDict()
        self._waiting = 0
        self._compilers = ThreadPoolExecutor(COMPILERS, "bdh-grammar")
        large = isinstance(vocabulary, Vocabulary) and vocabulary.size > small
        self._maskers = ThreadPoolExecutor(MASKERS, "bdh-mask") if large else None

    async def compile(self, source: Source) -> CompiledGrammar:
        """
        Raises:
            InvalidRequest: it is none, is too large, or nothing satisfies it; the field is named.
            QueueFull: too many are being compiled.
        """
        if isinstance(self._vocabulary, str):
            raise UnsupportedParameter(f"This model's answers can follow no form: {self._vocabulary}.", source.param)
        for each in (*source.parts, source):
            if (size := len(each.grammar.encode())) > self._most_bytes:
                text = f"A schema or grammar may have {self._most_bytes} bytes here (limits.max_schema_bytes)"
                raise InvalidRequest(f"{each.param}: {text}, and this has {size}.", each.param)
        matcher = await self._compiled(self._vocabulary, source)
        if isinstance(matcher, str):
            for part in source.parts:
                if isinstance(problem := await self._compiled(self._vocabulary, part), str):
                    raise InvalidRequest(f"{part.param}: {problem}", part.param)
            raise InvalidRequest(f"{source.param}: {matcher}", source.param)
        return CompiledGrammar(matcher, self._vocabulary, source, self._maskers)

    async def _compiled(self, vocabulary: Vocabulary, source: Source) -> LLMatcher | str:
        job = self._jobs.get(source.grammar) or self._begin(vocabulary.tokens, source.grammar)
        self._jobs.move_to_end(source.grammar)
        await asyncio.wait([job.outcome], timeout=self._seconds)
        if job.outcome.done():
            return job.outcome.result()
        if not job.started:
            raise QueueFull("Too many grammars are being compiled.", retry_after=5)
        return f"It takes more than {self._seconds:g} s to compile."

    def _begin(self, tokens: LLTokenizer, grammar: str) -> _Job:
        if self._waiting >= self._most_waiting:
            raise QueueFull("Too many grammars are being compiled.", retry_after=5)
        job = self._jobs[grammar] = _Job()
        self._waiting += 1
        loop = asyncio.get_running_loop()
        job.outcome = loop.run_in_executor(self._compilers, compile_grammar, tokens, grammar, job)
        job.outcome.add_done_callback(self._finished)
        return job

    def _finished(self, outcome: asyncio.Future[LLMatcher | str]) -> None:
        self._waiting -= 1
        done = [grammar for grammar, job in self._jobs.items() if job.outcome.done()]
        for grammar in done[: max(0, len(self._jobs) - KEPT)]:
            del self._jobs[grammar]


def compile_grammar(tokens: LLTokenizer, grammar: str, job: _Job) -> LLMatcher | str:
    """A matcher at the beginning of `grammar`, or why there is none. Slow, without holding the interpreter's lock."""
    job.started = True
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return _reason(matcher)
    beginnings = matcher.compute_bitmask()
    if not any(beginnings) or (matcher.is_error() and not matcher.is_accepting()):
        return "Nothing satisfies it."
    return matcher


def _reason(matcher: LLMatcher) -> str:
    """What llguidance says is wrong, without what is for its authors."""
    message = matcher.get_error()
    if message.startswith("panic"):
        return "It is too large."
    return " ".join(_FOR_AUTHORS.split(message)[0].split())[:MESSAGE]


class CompiledGrammar:
    """Constraints of one grammar share what was compiled, and what they learn of it."""

    def __init__(
        self, matcher: LLMatcher, vocabulary: Vocabulary, source: Source, maskers: Executor | None = None
    ) -> None:
        self._matcher = matcher
        self._vocabulary = vocabulary
        self._source = source
        self._maskers = maskers

    def constraint(self, early: float = 0) -> Constraint:
        return TriggeredConstraint(self, self._source.trigger, early) if self._source.trigger else self.walk(early)

    def walk(self, early: float) -> GrammarConstraint:
        return GrammarConstraint(self._matcher.deep_copy(), self._vocabulary, self._source.param, early, self._maskers)

    def text(self, token: int) -> bytes:
        return self._vocabulary.text(token)

    def tokens(self, text: bytes) -> list[int]:
        return self._vocabulary.tokens.tokenize_bytes(text) if text else []


class GrammarConstraint:
    """One answer's way through a grammar.

    Args:
        early: tokens before which the answer does not end as long as it can go on.
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
    ) -> None:
        self.complete = False
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
        except Exception:  # noqa: BLE001 - `accept` meets it again, and there it ends no more than this answer
            return None
        return None if self._may_end_anywhere() else bits

    def accept(self, token: int) -> bool:
        bits = self._allowed()
        allowed = token < 8 * len(bits) and bits[token >> 3] >> (token & 7) & 1
        if self._may_end_anywhere() and not (allowed and token != self._vocabulary.tokens.eos_token):
            return False
        if not (allowed and self._matcher.consume_token(token)):
            reason = _reason(self._matcher) or "no token can follow"
            raise InvalidRequest(f"{self._param}: The answer cannot go on in this grammar ({reason}).", self._param)
        self._early -= 1
        self.complete = self._matcher.is_stopped() and not self._matcher.is_error()
        self._look_ahead()
        return True

    def follow(self, tokens: Sequence[int]) -> bool:
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
        """Whether the answer may end here, and no token says so: the model has none, or none may come yet."""
        if not self._matcher.is_accepting():
            return False
        return not any(self._allowed()) if self._early > 0 else not self._vocabulary.ends


class TriggeredConstraint:
    """Any text, until the trigger has been said; then the grammar."""

    def __init__(self, grammar: CompiledGrammar, trigger: str, early: float) -> None:
        self._grammar = grammar
        self._early = early
        self._trigger = trigger.encode()
        self._said = b""  # the end of the text, as far as the trigger may be beginning there
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
            if inner.follow(self._grammar.tokens(rest)):
                self._inner = inner
        return True
