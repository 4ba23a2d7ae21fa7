"""Grammars of structured output: tried out in a sandbox, compiled here if they pass, and cached by their bytes.

What compiling a grammar costs cannot be predicted, and it cannot be stopped: a hundred bytes can cost gigabytes, or the
stack. In the sandbox it is killed; here it does again what it has done there with less of everything.
A constraint itself stays in this process: a mask over bytes takes 0.7 µs, a question to another process 12 to 23.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from dataclasses import dataclass
from functools import partial

import orjson

from bdh_batch.errors import InvalidRequest, UnsupportedParameter
from bdh_batch.system.threads import DaemonThreads
from bdh_batch.text.compiler import compile_grammar
from bdh_batch.text.constraints import CompiledGrammar
from bdh_batch.text.grammar_cache import Compiled, GrammarCache, Problem
from bdh_batch.text.sandbox import JobFailed, Runs, Sandbox, Work
from bdh_batch.text.sandbox_process import JobLimits, Refused
from bdh_batch.text.sources import Source
from bdh_batch.text.turns import QueueLimits
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
    """

    def __init__(
        self,
        vocabulary: Vocabulary | str,
        sandbox: Runs | None,
        most_bytes: int = 2**19,
        cache_bytes: int = 2**28,
        small: int = SMALL,
    ) -> None:
        self._vocabulary = vocabulary
        self._sandbox = sandbox
        self._most_bytes = most_bytes
        self._cache = GrammarCache(cache_bytes)
        self._worn_out: set[bytes] = set()  # those of the kept that have reached a limit of the library's
        self._compiling: dict[bytes, _Compiling] = {}
        self._compilers = DaemonThreads(COMPILERS, "bdh-grammar")
        large = isinstance(vocabulary, Vocabulary) and vocabulary.size > small
        self._maskers = DaemonThreads(MASKERS, "bdh-mask") if large else None

    async def compile(self, source: Source, tenant: str = "") -> CompiledGrammar:
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
        if key in self._worn_out:
            self._worn_out.discard(key)
            self._cache.discard(key)
        found = self._cache.get(key) or await self._compiled(self._vocabulary, self._sandbox, job, key, tenant)
        if isinstance(found, Problem):
            param = found.param or source.param
            raise InvalidRequest(f"{param}: {found.text}", param)
        worn_out = partial(self._worn_out.add, key)
        return CompiledGrammar(
            found.matcher, self._vocabulary, source.param, source.trigger, self._maskers, worn_out, found.warnings
        )

    async def _compiled(
        self, vocabulary: Vocabulary, sandbox: Runs, job: bytes, key: bytes, tenant: str
    ) -> Compiled | Problem:
        """Requests of one tenant for one grammar wait for the same work, which ends when none of them waits for it."""
        on_its_way = self._compiling.get(key)
        if on_its_way is None:
            work = asyncio.ensure_future(self._compile(vocabulary, sandbox, job, key, tenant))
            on_its_way = self._compiling[key] = _Compiling(work)
        on_its_way.waiting += 1
        try:
            return await asyncio.shield(on_its_way.work)
        finally:
            on_its_way.waiting -= 1
            if not on_its_way.waiting:
                on_its_way.work.cancel()
                del self._compiling[key]

    async def _compile(
        self, vocabulary: Vocabulary, sandbox: Runs, job: bytes, key: bytes, tenant: str
    ) -> Compiled | Problem:
        async def here(said: bytes) -> Compiled | Problem:
            result = orjson.loads(said)
            if "problem" in result:
                return self._cache.add_problem(key, Problem(result["problem"], result["param"]))
            done = asyncio.wrap_future(self._compilers.submit(compile_grammar, vocabulary.tokens, result["grammar"]))
            try:
                matcher = await asyncio.shield(done)
            except asyncio.CancelledError:  # it goes on in its thread, and this turn with it
                await asyncio.wait([done])
                raise
            if isinstance(matcher, str):
                return self._cache.add_problem(key, Problem(matcher))
            for warning in result["warnings"]:
                log.info("%(param)s: %(path)r: %(text)s", warning)
            compiled = Compiled(matcher, result["warnings"])
            gone = self._cache.add(key, compiled, result["bytes"])
            self._compilers.submit(gone.clear)  # to free a large one takes a while
            return compiled

        try:
            return await sandbox.run(job, tenant, here)
        except Refused as refused:
            return self._cache.add_problem(key, Problem(str(refused)))
        except JobFailed as failed:
            return self._cache.add_problem(key, Problem(_problem_of(failed)))


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
