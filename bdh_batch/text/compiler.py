"""llguidance's compiler, as the sandbox and the server use it alike: what passes there compiles here, too."""

from __future__ import annotations

import re

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

MESSAGE = 400  # characters of llguidance's that a client is shown

_FOR_AUTHORS = re.compile(r"\n<|\n *\d+ \| ")

# What a mask or a token may cost: 20 ms each where a grammar is as ambiguous as it may be (with 2000 items in
# a step it was 40 and 26), mostly well below 1. Objects of 240 optional properties need the items in a row.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=50_000,
    step_max_items=1500,
    max_lexer_states=16_000,
    max_grammar_size=300_000,
    verbose_errors=False,
)


def compile_grammar(tokens: LLTokenizer, grammar: str) -> LLMatcher | str:
    """A matcher at the start of `grammar`, or why there is none. Slow, without holding the interpreter's lock."""
    matcher = LLMatcher(tokens, grammar, log_level=0, limits=LIMITS)
    if matcher.is_error():
        return reason(matcher)
    first_tokens = matcher.compute_bitmask()
    if not any(first_tokens) or (matcher.is_error() and not matcher.is_accepting()):
        return "Nothing satisfies it."
    return matcher


def reason(matcher: LLMatcher) -> str:
    """What llguidance says is wrong, without what is for its authors."""
    message = matcher.get_error()
    if message.startswith("panic"):
        return "It is too large."
    return " ".join(_FOR_AUTHORS.split(message)[0].split())[:MESSAGE]
