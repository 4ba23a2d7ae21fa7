"""Grammars of structured output: tried out in a sandbox, compiled here if they pass, and cached by their bytes.

What compiling a grammar costs cannot be predicted, and it cannot be stopped: a hundred bytes can cost gigabytes, or the
stack. In the sandbox it is killed; here it does again what it has done there with less of everything.
A constraint itself stays in this process: a mask over bytes takes 0.7 µs, a question to another process 12 to 23.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import orjson
from llguidance import LLMatcher

from bdh_batch.errors import InvalidRequest, UnsupportedParameter
from bdh_batch.messages import Grammar, GrammarText
from bdh_batch.system.threads import DaemonThreads
from bdh_batch.text.compiler import compile_grammar
from bdh_batch.text.constraints import CompiledGrammar
from bdh_batch.text.grammar_cache import Compiled, GrammarCache, Problem
from bdh_batch.text.job_queue import QueueLimits
from bdh_batch.text.sandbox import JobFailed, Runs, Sandbox, Work
from bdh_batch.text.sandbox_process import JobLimits, Refused
from bdh_batch.text.sources import Source
from bdh_batch.text.vocabulary import Vocabulary

log = logging.getLogger(__name__)

MODULE = "bdh_batch.text.probation"
STACK = 4 * 2**20  # bytes of the sandbox's; threads here have sixteen times as much
COMPILERS = 2  # threads
MASKERS = 2  # threads
SMALL = 4096  # tokens: a mask over so few is made sooner than it is handed to another thread


@dataclass(eq=False, slots=True)
class _Compiling:
    """A grammar on its way, and how many requests wait for it."""

    work: asyncio.Task[Compiled | Problem]
    waiting: int = 0


class Grammars:
    """Compiles grammars for a vocabulary, and keeps them.

    Args:
        vocabulary: a reason why there is none refuses every grammar.
        sandbox: where they are tried out; one that has prepared that vocabulary.
        most_bytes: of a schema or grammar as it comes.
        cache_bytes: that all compiled grammars may take.
        small: vocabularies larger than that have their masks made in other threads.
        elsewhere: whether grammars are compiled in the engine's process, and here only tried out.
    """

    def __init__(
        self,
        vocabulary: Vocabulary | str,
        sandbox: Runs | None,
        most_bytes: int = 2**19,
        cache_bytes: int = 2**28,
        small: int = SMALL,
        elsewhere: bool = False,
    ) -> None:
        self._vocabulary = vocabulary
        self._sandbox = sandbox
        self._most_bytes = most_bytes
        self._cache = GrammarCache(cache_bytes)
        self._worn_out: set[bytes] = set()  # those of the kept that have reached a limit of the library's
        self._compiling: dict[bytes, _Compiling] = {}
        self._elsewhere = elsewhere
        self._compilers = DaemonThreads(COMPILERS, "bdh-grammar")
        large = isinstance(vocabulary, Vocabulary) and vocabulary.size > small
        self._maskers = DaemonThreads(MASKERS, "bdh-mask") if large else None

    async def compile(self, source: Source, tenant: str = "") -> Grammar:
        """
        Raises:
            InvalidRequest: it is none, is too large, or nothing satisfies it; the field is named.
            QueueFull, Unavailable: not now.
        """
        if isinstance(self._vocabulary, str) or self._sandbox is None:
            raise UnsupportedParameter(
                f"This model does not support structured output: {self._vocabulary}.", source.param
            )
        job = source.written(self._most_bytes)
        # Completions share what a grammar learns of itself, and its limits: only one tenant's do.
        key = hashlib.sha256(b"%b\0%b" % (tenant.encode(), job)).digest()
        self._forget_worn_out(key)
        found = self._cache.get(key) or await self._compiled(self._sandbox, job, key, tenant)
        if isinstance(found, Problem):
            param = found.param or source.param
            raise InvalidRequest(f"{param}: {found.text}", param)
        text = GrammarText(found.text, found.size, source.param, source.trigger, found.warnings, tenant)
        return text if found.matcher is None else self._grammar(found.matcher, text, key)

    async def compiled(self, text: GrammarText) -> Grammar:
        """What has been tried out in another process. Raises InvalidRequest: it is none for this vocabulary."""
        assert isinstance(self._vocabulary, Vocabulary)
        key = hashlib.sha256(f"{text.tenant}\0{text.text}".encode()).digest()
        self._forget_worn_out(key)
        found = self._cache.get(key)
        if not isinstance(found, Compiled) or found.matcher is None:
            found = await asyncio.shield(asyncio.ensure_future(self._matcher(key, text.text, text.size, text.warnings)))
        if isinstance(found, Problem) or found.matcher is None:
            raise InvalidRequest(f"{text.param}: {getattr(found, 'text', '')}", text.param)
        return self._grammar(found.matcher, text, key)

    def _grammar(self, matcher: LLMatcher, text: GrammarText, key: bytes) -> CompiledGrammar:
        assert isinstance(self._vocabulary, Vocabulary)
        worn_out = partial(self._worn_out.add, key)
        return CompiledGrammar(
            matcher, self._vocabulary, text.param, text.trigger, self._maskers, worn_out, text.warnings
        )

    def _forget_worn_out(self, key: bytes) -> None:
        if key in self._worn_out:
            self._worn_out.discard(key)
            self._cache.discard(key)

    async def _compiled(self, sandbox: Runs, job: bytes, key: bytes, tenant: str) -> Compiled | Problem:
        """Requests of one tenant for one grammar wait for the same work, which ends when none of them waits for it."""
        on_its_way = self._compiling.get(key)
        if on_its_way is None:
            work = asyncio.ensure_future(self._compile(sandbox, job, key, tenant))
            on_its_way = self._compiling[key] = _Compiling(work)
        on_its_way.waiting += 1
        try:
            return await asyncio.shield(on_its_way.work)
        finally:
            on_its_way.waiting -= 1
            if not on_its_way.waiting:
                on_its_way.work.cancel()
                del self._compiling[key]

    async def _compile(self, sandbox: Runs, job: bytes, key: bytes, tenant: str) -> Compiled | Problem:
        async def here(said: bytes) -> Compiled | Problem:
            result = orjson.loads(said)
            if "problem" in result:
                return self._cache.add_problem(key, Problem(result["problem"], result["param"]))
            for warning in result["warnings"]:
                log.info("%(param)s: %(path)r: %(text)s", warning)
            text, size, warnings = result["grammar"], result["bytes"], result["warnings"]
            if not self._elsewhere:
                return await self._matcher(key, text, size, warnings)
            compiled = Compiled(None, text, size, warnings)
            self._cache.add(key, compiled)
            return compiled

        try:
            return await sandbox.run(job, tenant, here)
        except Refused as refused:
            return self._cache.add_problem(key, Problem(str(refused)))
        except JobFailed as failed:
            return self._cache.add_problem(key, Problem(_problem_of(failed)))

    async def _matcher(
        self, key: bytes, text: str, size: int, warnings: Sequence[Mapping[str, str]]
    ) -> Compiled | Problem:
        """Compiles what has been tried out, and caches it."""
        assert isinstance(self._vocabulary, Vocabulary)
        done = asyncio.wrap_future(self._compilers.submit(compile_grammar, self._vocabulary.tokens, text))
        try:
            matcher = await asyncio.shield(done)
        except asyncio.CancelledError:  # it goes on in its thread, and this turn with it
            await asyncio.wait([done])
            raise
        if isinstance(matcher, str):
            return self._cache.add_problem(key, Problem(matcher))
        compiled = Compiled(matcher, text, size, warnings)
        gone = self._cache.add(key, compiled)
        self._compilers.submit(gone.clear)  # to free a large one takes a while
        return compiled


def open_sandbox(setup: bytes, seconds: float, memory: int, queue: QueueLimits) -> Sandbox:
    """Where grammars are tried out for the vocabulary of `setup` (`vocabulary.setup_of`).

    Args:
        seconds, memory: that one may take.
    """
    limits = JobLimits(seconds, memory, trusted_setup=True, stack=STACK)
    options = ("structured_output.compile_seconds", "structured_output.grammar_memory")
    return Sandbox(Work(MODULE, setup, limits, *options), queue)


def _problem_of(failed: JobFailed) -> str:
    if failed.outcome == "crash":
        return "The grammar's compiler fails on it: it is nested or chained too deeply, or has a number out of range."
    return f"Compiling it is too much: {failed}."
