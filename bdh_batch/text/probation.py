"""Grammars on probation: compiled in a sandbox before the server does so, and followed for some tokens.

A job is a source (`sources.py`); its result is the grammar, what it took, or what is wrong with it. Knows nothing of
requests.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import Any

import orjson
from llguidance import LLMatcher

from bdh_batch.text.compiler import compile_grammar
from bdh_batch.text.lark import Written, written
from bdh_batch.text.sandbox_process import Prepared, Refused, memory_in_use
from bdh_batch.text.schemas import NoGrammar
from bdh_batch.text.vocabulary import Vocabulary, vocabulary_from

WALKS = 4  # the first allowed token always, the last, and by lot
STEPS = 48  # tokens of each
SLOW = 0.05  # seconds of processor time for one mask or token
WALK_SECONDS = 1.0  # for all of them


class Problem(Exception):
    """What is wrong with a source, and the field of the request that it is in."""

    def __init__(self, text: str, param: str) -> None:
        super().__init__(text)
        self.param = param


def prepare(setup: bytes) -> Prepared:
    """What a sandbox needs to try grammars out for the vocabulary of `setup`."""
    vocabulary = vocabulary_from(setup)
    if isinstance(vocabulary, str):
        raise Refused(vocabulary)
    return Prepared(work_for(vocabulary))


def work_for(vocabulary: Vocabulary) -> Callable[[bytes], bytes]:
    return lambda job: orjson.dumps(outcome(vocabulary, job))


def outcome(vocabulary: Vocabulary, job: bytes) -> dict[str, Any]:
    kind, value, param, parts = orjson.loads(job)
    before = memory_in_use()[1]
    try:
        made, resident = tried(vocabulary, kind, value, param)
    except Problem as problem:
        found = next(filter(None, (_problem_of(vocabulary, part) for part in parts)), problem)
        return {"problem": str(found), "param": found.param}
    size = max(0, resident - before) + len(made.grammar)
    return {"grammar": made.grammar, "bytes": size, "warnings": made.warnings}


def _problem_of(vocabulary: Vocabulary, part: Any) -> Problem | None:
    kind, value, param, _ = part
    try:
        tried(vocabulary, kind, value, param)
    except Problem as problem:
        return problem
    return None


def tried(vocabulary: Vocabulary, kind: str, value: Any, param: str) -> tuple[Written, int]:
    """The grammar, if it compiles and can be followed, and the bytes of memory in use while it is compiled.

    Raises:
        Problem
    """
    try:
        made = written(kind, value, param)
    except NoGrammar as error:
        raise Problem(str(error), param) from error
    matcher = compile_grammar(vocabulary.tokens, made.grammar)
    if isinstance(matcher, str):
        raise Problem(matcher, param)
    began = time.thread_time()
    for walk in range(WALKS):
        slowest = follow(matcher.deep_copy(), choice(walk))
        if slowest > SLOW and isinstance(again := compile_grammar(vocabulary.tokens, made.grammar), LLMatcher):
            slowest = min(slowest, follow(again, choice(walk)))  # chance does not strike twice
        if slowest > SLOW:
            raise Problem(f"A token of it takes {slowest * 1000:.0f} ms: it is too ambiguous.", param)
        if time.thread_time() - began > WALK_SECONDS:
            raise Problem(f"{STEPS} tokens of it take more than {WALK_SECONDS:g} s: it is too ambiguous.", param)
    return made, memory_in_use()[1]


def choice(walk: int) -> Callable[[int], int]:
    """How the next of the allowed tokens is chosen; they are the bits of an integer."""
    if walk == 0:
        return lambda allowed: (allowed & -allowed).bit_length() - 1
    if walk == 1:
        return lambda allowed: allowed.bit_length() - 1
    lots = random.Random(walk)

    def by_lot(allowed: int) -> int:
        begin = lots.randrange(allowed.bit_length())
        after = allowed >> begin << begin
        return (after & -after).bit_length() - 1

    return by_lot


def follow(matcher: LLMatcher, choose: Callable[[int], int]) -> float:
    """Goes some tokens through a grammar; the processor time of the slowest mask or token."""
    slowest = 0.0
    for _ in range(STEPS):
        began = time.thread_time()
        mask = matcher.compute_bitmask()
        masked = time.thread_time()
        allowed = int.from_bytes(mask, "little")
        if not allowed:
            break
        token = choose(allowed)
        chosen = time.thread_time()
        taken = matcher.consume_token(token)
        slowest = max(slowest, masked - began, time.thread_time() - chosen)
        if not taken or matcher.is_stopped():
            break
    return slowest
