"""What callers give as prompts, sorted out: one or many, texts or token ids, conversations, pairs to score."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from bdh_batch.errors import InvalidRequest

T = TypeVar("T")

TEXT, TOKENS = "prompt", "prompt_token_ids"  # of a prompt that is a mapping, as in vLLM
Plain = str | list[int]


def is_one(given: object) -> bool:
    """Whether it is one prompt, and not a list of them."""
    if isinstance(given, str | Mapping) or hasattr(given, "tolist"):
        return isinstance(given, str | Mapping) or getattr(given, "ndim", 1) == 1
    return isinstance(given, list | tuple) and len(given) > 0 and all(type(each) is int for each in given)


def gathered(given: T) -> T | list[Any]:
    """What is given, with a list for anything that may compute its items as they are asked for: by the caller's own
    code, which belongs on the caller's thread, and may use the model itself."""
    if isinstance(given, str | bytes | Mapping | list | tuple) or hasattr(given, "tolist"):
        return given
    return [*given] if isinstance(given, Iterable) else given


def plain(given: object, name: str) -> Plain:
    """One prompt, as a text or a list of token ids. Raises InvalidRequest, naming it."""
    if isinstance(given, Mapping):
        known = [each for each in (TEXT, TOKENS) if given.get(each) is not None]
        if len(known) != 1 or (unknown := given.keys() - {TEXT, TOKENS}):
            problem = (
                f"Unknown field {sorted(map(str, unknown))[0]!r:.128}." if len(known) == 1 else "Give one of them."
            )
            raise InvalidRequest(f"{name}: A mapping has {TEXT!r}, a text, or {TOKENS!r}. {problem}", name)
        given, name = given[known[0]], f"{name}.{known[0]}"
    if isinstance(given, str):
        return given
    tokens: Any = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(tokens, list | tuple) and {int}.issuperset(map(type, tokens)):
        return [*tokens]
    raise InvalidRequest(f"{name}: Input should be a text, or a list of token ids.", name)


def listed(given: object, name: str) -> tuple[list[tuple[str, Plain]], bool]:
    """The prompts, each with what errors call it, and whether they came as a list. Raises InvalidRequest."""
    if is_one(given):
        return [(name, plain(given, name))], False
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InvalidRequest(f"{name}: Input should be a text, token ids, or a list of either.", name)
    return [(f"{name}[{index}]", plain(each, f"{name}[{index}]")) for index, each in enumerate(given)], True


def conversations(given: object) -> list[tuple[str, list[Any]]]:
    """The conversations, each with what errors call it: of one, as a list of messages, or of several."""
    if isinstance(given, Mapping | str | bytes) or not isinstance(given, Iterable):
        text = "messages: Input should be a list of messages, or a list of such lists."
        raise InvalidRequest(text, "messages")
    items = [*given]
    if not items or not all(isinstance(each, list | tuple) for each in items):
        return [("messages", items)]
    return [(f"messages[{index}]", [*each]) for index, each in enumerate(items)]


Pair = tuple[str, Plain, str, Plain]  # a prompt and its continuation, each after what errors call it


def pairs(prompts: object, continuations: object) -> list[Pair]:
    """What is to be scored: prompts with their continuations.

    Of one prompt and several continuations, or the other way round, the one goes with each. Without continuations,
    `prompts` are pairs, or whole texts, after nothing.

    Raises:
        InvalidRequest
    """
    if continuations is None:
        return _as_pairs(prompts)
    before, several = listed(prompts, "prompts")
    after, several_after = listed(continuations, "continuations")
    if not several and several_after:
        before = before * len(after)
    elif several and not several_after:
        after = after * len(before)
    if len(before) != len(after):
        text = f"continuations: {len(after)} were given for {len(before)} prompts."
        raise InvalidRequest(text, "continuations")
    return [(*one, *other) for one, other in zip(before, after)]


def _as_pairs(given: object) -> list[Pair]:
    if is_one(given):
        return [("prompts", "", "prompts", plain(given, "prompts"))]
    if isinstance(given, bytes) or not isinstance(given, Iterable):
        raise InvalidRequest("prompts: Input should be texts, or pairs of a prompt and its continuation.", "prompts")
    return [_pair(each, f"prompts[{index}]") for index, each in enumerate(given)]


def _pair(given: object, name: str) -> Pair:
    if isinstance(given, tuple) and not is_one(given):
        if len(given) != 2:
            raise InvalidRequest(f"{name}: A pair has a prompt and its continuation.", name)
        return (f"{name}[0]", plain(given[0], f"{name}[0]"), f"{name}[1]", plain(given[1], f"{name}[1]"))
    return (name, "", name, plain(given, name))
