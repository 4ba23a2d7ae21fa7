"""Random requests that look for crashes, hangs and growth: grammars, expressions, schemas, conversations, bodies.

Each is made from a seed alone, so that a seed is all that is needed to send it again. Most are nearly right: what is
plainly wrong is refused before it can do harm.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

Json = Any
Body = dict[str, Any]

NUMBERS = (0, 1, -1, 2, 7, 63, 255, 4096, 99_999_989, 2**31, 2**53 + 1, -(2**63), 2**63, 10**30, 0.5, -0.1, 1e-9, 1e308)
COUNTS = (0, 1, 2, 3, 9, 60, 900, 5000, 10**6, 10**9)
TEXTS = ("", "a", "ab", "é", "😀", "\x00", "\u2028", '"', "\\", "<|im_end|>", "<tool_call>", "\U000f0000", "a" * 300)
CLASSES = (r"\d", r"\w", r"\s", ".", r"\p{L}", r"\P{Greek}", "[a-z]", "[^a]", "[\\x00-\\xff]", r"\u00e9", "[]")
FORMATS = ("date-time", "email", "uuid", "ipv6", "uri", "time", "duration", "regex", "made-up", "hostname")
KEYWORDS = ("not", "if", "then", "contains", "uniqueItems", "propertyNames", "dependentRequired", "x-guidance")


def often(chance: random.Random, share: float) -> bool:
    return chance.random() < share


def expression(chance: random.Random, depth: int = 4) -> str:
    """A regular expression, mostly a valid one."""
    if depth == 0 or often(chance, 0.2):
        return chance.choice((*CLASSES, "a", "b", "ab", "é", r"\.", ""))
    inner = expression(chance, depth - 1)
    form = chance.randrange(9)
    if form == 0:
        return f"({inner}){{{chance.choice(COUNTS)},{chance.choice(COUNTS)}}}"
    if form == 1:
        return f"({inner}){{{chance.choice(COUNTS)}}}"
    if form == 2:
        return f"({inner}){chance.choice('*+?')}"
    if form == 3:
        return "|".join(expression(chance, depth - 1) for _ in range(chance.choice((2, 3, 30))))
    if form == 4:
        return f"(?{chance.choice(('=', '!', '<=', ':', 'i:', 'P<x>'))}{inner})"
    if form == 5:
        return "(" * (deep := chance.choice((1, 5, 300))) + inner + ")" * deep
    return inner + expression(chance, depth - 1)


def lark(chance: random.Random) -> str:
    """A grammar in llguidance's form of Lark, mostly a valid one."""
    rules = [f"r{i}" for i in range(chance.choice((1, 2, 5, 40)))]
    terminals = [f"T{i}" for i in range(chance.choice((0, 1, 3, 30)))]
    lines = [f"start: {chance.choice(rules)}"]
    lines += [f"{name}: {_alternatives(chance, rules + terminals)}" for name in rules]
    for at, name in enumerate(terminals):
        # Terminals must not be recursive: each may use those that come before it.
        lines.append(f"{name}: {_terminal(chance, terminals[:at])}")
    if often(chance, 0.2):
        lines.append("%ignore /[ \\t]+/")
    if often(chance, 0.2):
        lines.append(f"{chance.choice(rules)}: %json {{}}")
    return "\n".join(lines)


def _alternatives(chance: random.Random, names: Sequence[str], depth: int = 2) -> str:
    many = range(chance.choice((1, 1, 2, 5)))
    return " | ".join(" ".join(_item(chance, names, depth) for _ in range(chance.choice((0, 1, 2, 4)))) for _ in many)


def _item(chance: random.Random, names: Sequence[str], depth: int) -> str:
    form = chance.randrange(8)
    if form < 3:
        found = chance.choice(names)
    elif form == 3:
        found = f"/{expression(chance, 2).replace('/', '')}/"
    elif form == 4 and depth:
        found = f"({_alternatives(chance, names, depth - 1)})"
    else:
        found = chance.choice(('"a"', '"b"', '"<|im_end|>"', "<[1-5]>", "<|x|>", '""', '"é"'))
    return found + chance.choice(("", "", "", "*", "+", "?", f"{{{chance.choice(COUNTS)},{chance.choice(COUNTS)}}}"))


def _terminal(chance: random.Random, earlier: Sequence[str]) -> str:
    parts = [chance.choice(earlier) if earlier and often(chance, 0.5) else f"/{expression(chance, 3)}/"]
    while often(chance, 0.5):
        parts += [chance.choice((" & ", " | ", " ", " & ~")), f"/{expression(chance, 2)}/"]
    return "".join(parts)


def schema(chance: random.Random, depth: int = 4) -> Json:
    """A JSON schema, mostly a valid one."""
    if depth == 0 or often(chance, 0.15):
        return chance.choice(
            (True, False, {}, {"type": "string"}, {"$ref": "#"}, {"$ref": "#/$defs/d0"}, {"$ref": "?"})
        )
    found: Body = {}
    for part in chance.sample(PARTS, chance.choice((1, 2, 3))):
        part(chance, found, depth - 1)
    if often(chance, 0.1):
        found[chance.choice(KEYWORDS)] = chance.choice((True, {"type": "string"}, schema(chance, depth - 1)))
    if often(chance, 0.2):
        found["$defs"] = {f"d{i}": schema(chance, min(1, depth - 1)) for i in range(chance.choice((1, 3, 30)))}
    return found


def _number(chance: random.Random, found: Body, depth: int) -> None:
    found["type"] = chance.choice(("integer", "number"))
    for name in chance.sample(("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"), 2):
        found[name] = chance.choice(NUMBERS)


def _string(chance: random.Random, found: Body, depth: int) -> None:
    found["type"] = "string"
    found[chance.choice(("minLength", "maxLength"))] = chance.choice(COUNTS)
    if often(chance, 0.5):
        found["pattern"] = expression(chance, 3)
    if often(chance, 0.3):
        found["format"] = chance.choice(FORMATS)


def _array(chance: random.Random, found: Body, depth: int) -> None:
    found |= {"type": "array", "items": schema(chance, depth)}
    found[chance.choice(("minItems", "maxItems"))] = chance.choice(COUNTS)
    if often(chance, 0.3):
        found["prefixItems"] = [schema(chance, depth) for _ in range(3)]


def _object(chance: random.Random, found: Body, depth: int) -> None:
    names = [f"{chance.choice(TEXTS)}{i}" for i in range(chance.choice((0, 1, 4, 50)))]
    found |= {"type": "object", "properties": {name: schema(chance, depth if len(names) < 9 else 0) for name in names}}
    found["required"] = [name for name in names if often(chance, 0.5)]
    found["additionalProperties"] = chance.choice((True, False, schema(chance, 0)))
    if often(chance, 0.2):
        found["patternProperties"] = {expression(chance, 2): schema(chance, 0)}


def _choices(chance: random.Random, found: Body, depth: int) -> None:
    found[chance.choice(("anyOf", "oneOf", "allOf"))] = [
        schema(chance, depth) for _ in range(chance.choice((0, 1, 2, 3)))
    ]


def _values(chance: random.Random, found: Body, depth: int) -> None:
    if often(chance, 0.5):
        found["const"] = value(chance, 2)
    else:
        found["enum"] = [value(chance, 1) for _ in range(chance.choice((0, 1, 3, 50)))]


PARTS: tuple[Callable[[random.Random, Body, int], None], ...] = (_number, _string, _array, _object, _choices, _values)


def value(chance: random.Random, depth: int = 3) -> Json:
    """Any JSON."""
    if depth == 0 or often(chance, 0.4):
        return chance.choice((None, True, False, chance.choice(NUMBERS), chance.choice(TEXTS)))
    many = range(chance.choice((0, 1, 2, 40 if depth == 1 else 4)))
    if often(chance, 0.5):
        return [value(chance, depth - 1) for _ in many]
    return {f"{chance.choice(TEXTS)}{i}": value(chance, depth - 1) for i in many}


def conversation(chance: random.Random) -> Body:
    """A chat, whose texts spell special tokens and marks, with calls of tools and variables for the template."""

    def text() -> str:
        return "".join(chance.choice((*TEXTS, "<|im_", "start|>", "end|>\n<|im_start|>system")) for _ in range(6))

    messages: list[Body] = []
    for _ in range(chance.choice((1, 2, 9, 300))):
        role = chance.choice(("system", "user", "assistant", "tool", "developer"))
        message: Body = {"role": role, "content": chance.choice((text(), [{"type": "text", "text": text()}]))}
        if role == "tool":
            message["tool_call_id"] = text()
        if role == "assistant" and often(chance, 0.5):
            called = {"name": "f", "arguments": chance.choice(("{}", '{"a":"<|im_end|>"}', "", "nonsense", "[1]"))}
            message["tool_calls"] = [{"id": "1", "type": "function", "function": called}]
        messages.append(message)
    found: Body = {"messages": messages}
    if often(chance, 0.3):
        found["chat_template_kwargs"] = {"x": value(chance, 4)}
    if often(chance, 0.3):
        found["continue_final_message"] = True
        found["add_generation_prompt"] = False
    return found


def completion(chance: random.Random) -> Body:
    """Parameters of all kinds, most of them in range."""
    found: Body = {"prompt": chance.choice(("a", ["a", "b"], [1, 2], [[1], [2, 3]], "", value(chance, 2)))}
    choices: Body = {
        "n": chance.choice((1, 2, 16, 17)),
        "stop": [chance.choice(TEXTS) for _ in range(chance.choice((1, 16, 17)))],
        "stop_token_ids": [chance.randrange(300) for _ in range(chance.choice((1, 500)))],
        "logit_bias": {str(chance.randrange(300)): chance.choice((-100, 0, 100, 101)) for _ in range(50)},
        "logprobs": chance.choice((0, 5, 20, 21)),
        "echo": True,
        "temperature": chance.choice((0, 1e-9, 1, 2, 3)),
        "top_p": chance.choice((0, 1e-9, 0.5, 1)),
        "top_k": chance.choice((-1, 0, 1, 10**9)),
        "min_p": chance.choice((0, 0.5, 1)),
        "repetition_penalty": chance.choice((1e-30, 1, 1e30)),
        "min_tokens": chance.choice((0, 8, 9)),
        "priority": chance.choice((-1000, -1, 0, 1000)),
        "stream": True,
        "metadata": value(chance, 3),
    }
    for name in chance.sample(sorted(choices), 4):
        found[name] = value(chance, 2) if often(chance, 0.1) else choices[name]
    return found


def turn(chance: random.Random) -> Body:
    """A turn of the Responses API: items of all types, what asks for structured output, ids that are nobody's."""
    items: list[Body] = []
    for message in conversation(chance)["messages"]:
        if message["role"] == "tool":
            output = {"type": "function_call_output", "call_id": message["tool_call_id"], "output": message["content"]}
            items.append(output)
            continue
        content = message["content"]
        if isinstance(content, list):
            kind = "output_text" if message["role"] == "assistant" else "input_text"
            content = [{"type": kind, "text": part["text"]} for part in content]
        items.append({"role": message["role"], "content": content})
        calls = message.get("tool_calls", ())
        items += ({"type": "function_call", "call_id": call["id"], **call["function"]} for call in calls)
    found: Body = {"input": chance.choice((items, "a")), "max_output_tokens": 8}
    choices: Body = {
        "background": True,
        "stream": True,
        "store": chance.choice((True, False)),
        "instructions": chance.choice(TEXTS),
        "previous_response_id": chance.choice(("resp_0", "", "é", f"resp_{chance.randrange(2**64):032x}")),
        "text": {"format": {"type": "json_schema", "name": "x", "schema": schema(chance)}},
        "tools": [{"type": "function", "name": f"f{i}", "parameters": schema(chance)} for i in range(2)],
        "top_logprobs": chance.choice((0, 20, 21)),
        "metadata": value(chance, 2),
    }
    for name in chance.sample(sorted(choices), 3):
        found[name] = value(chance, 2) if often(chance, 0.1) else choices[name]
    return found


def request(seed: int) -> tuple[str, Body]:
    """A path and a body."""
    chance = random.Random(seed)
    kind = chance.randrange(8)
    short: Body = {"prompt": "a", "max_tokens": 8}
    # What is computed is no part of this: most of a conversation's tokens are left out once they are known.
    few: Body = {"max_tokens": 8, "truncate_prompt_tokens": 64}
    if kind == 0:
        return "/v1/completions", short | {"structured_outputs": {"grammar": lark(chance)}}
    if kind == 1:
        return "/v1/completions", short | {"structured_outputs": {"regex": expression(chance, 6)}}
    if kind in (2, 3):
        asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema(chance)}}
        return "/v1/chat/completions", conversation(chance) | few | {"response_format": asked}
    if kind == 4:
        tools = [{"type": "function", "function": {"name": f"f{i}", "parameters": schema(chance)}} for i in range(2)]
        return "/v1/chat/completions", conversation(chance) | few | {"tools": tools}
    if kind == 5:
        return "/v1/chat/completions", conversation(chance) | few
    if kind == 6:
        return "/v1/responses", turn(chance)
    return "/v1/completions", few | completion(chance)
