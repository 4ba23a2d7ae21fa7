"""What is said to the server: conversations of one turn or several, random or from a file."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle, dropwhile, takewhile
from pathlib import Path
from random import Random
from typing import Any

from bdh_batch.bench.options import Options
from bdh_batch.bench.sendable import check_sendable
from bdh_batch.bench.texts import Writer
from bdh_batch.errors import ConfigError

# As vLLM does: what is too short says nothing, what is too long is for another benchmark.
SHORTEST, LONGEST_PROMPT, LONGEST = 4, 1024, 2048
USERS = ("human", "user")


@dataclass(frozen=True)
class Prompt:
    """One turn; `tokens` is how many it has as far as the client knows, `output_tokens` the most of its response."""

    content: str | list[int]
    tokens: int
    output_tokens: int


Conversation = Sequence[Prompt]


async def conversations(options: Options, writer: Writer) -> list[Conversation]:
    """As many as have --num-prompts turns together, or fewer with --no-oversample; the same for the same seed.

    Raises ConfigError where a file cannot be read or holds nothing to send.
    """
    made = await MAKERS[options.dataset_name](options, writer)
    if not made:
        raise ConfigError(f"--dataset-path {options.dataset_path}: holds nothing that can be sent")
    if options.chats and any(not isinstance(turn.content, str) for turns in made for turn in turns):
        raise ConfigError(f"--dataset-path {options.dataset_path}: has token ids, which a chat cannot say")
    return list(_as_many(made if options.no_oversample else cycle(made), options.num_prompts))


def _as_many(source: Iterator[Conversation] | list[Conversation], turns: int) -> Iterator[Conversation]:
    for conversation in source:
        yield conversation[:turns]
        turns -= min(turns, len(conversation))
        if not turns:
            return


def _generator(options: Options, *path: object) -> Random:
    """Of one thing that is drawn, whatever else is."""
    return Random("/".join(map(str, (options.seed, *path))))


def _drawn(draw: Random, length: int, share: float) -> int:
    """A length within ± `share` of itself."""
    return draw.randint(max(1, math.floor(length * (1 - share))), math.ceil(length * (1 + share)))


async def _random_turn(options: Options, writer: Writer, draw: Random) -> Prompt:
    text, tokens = await writer.text(draw, _drawn(draw, options.random_input_len, options.random_range_ratio))
    return Prompt(text, tokens, _drawn(draw, options.random_output_len, options.random_range_ratio))


async def _random(options: Options, writer: Writer) -> list[Conversation]:
    prefix, more = await writer.text(_generator(options, "prefix"), options.random_prefix_len)

    async def make(number: int) -> Conversation:
        turn = await _random_turn(options, writer, _generator(options, "random", number))
        return [Prompt(prefix + str(turn.content), more + turn.tokens, turn.output_tokens)]

    return await asyncio.gather(*map(make, range(options.num_prompts)))


async def _prefix_repetition(options: Options, writer: Writer) -> list[Conversation]:
    numbers = range(min(options.prefix_repetition_num_prefixes, options.num_prompts))
    prefixes = await asyncio.gather(
        *(writer.text(_generator(options, "prefix", n), options.prefix_repetition_prefix_len) for n in numbers)
    )

    async def make(number: int) -> Conversation:
        prefix, more = prefixes[number % len(prefixes)]
        draw = _generator(options, "suffix", number)
        text, tokens = await writer.text(draw, options.prefix_repetition_suffix_len)
        return [Prompt(prefix + text, more + tokens, options.prefix_repetition_output_len)]

    made = await asyncio.gather(*map(make, range(options.num_prompts)))
    return _shuffled(options, made)


async def _sharegpt(options: Options, writer: Writer) -> list[Conversation]:
    found: list[Conversation] = []
    for said in _shuffled(options, _recorded(options)):
        turn = await _recorded_turn(options, writer, said[0], said[1])
        if turn.tokens < SHORTEST or turn.tokens > LONGEST_PROMPT:
            continue
        if turn.output_tokens < SHORTEST and options.sharegpt_output_len is None:
            continue
        if turn.tokens + turn.output_tokens <= LONGEST:
            found.append([turn])
        if len(found) == options.num_prompts:
            break
    return found


async def _multi_turn(options: Options, writer: Writer) -> list[Conversation]:
    turns = options.multi_turn_num_turns
    if options.dataset_path is None:

        async def make(number: int) -> Conversation:
            draws = [_generator(options, "turn", number, turn) for turn in range(turns)]
            return await asyncio.gather(*(_random_turn(options, writer, draw) for draw in draws))

        return await asyncio.gather(*map(make, range(math.ceil(options.num_prompts / turns))))
    found: list[Conversation] = []
    wanted = options.num_prompts
    for said in _shuffled(options, _recorded(options)):
        pairs = list(zip(said[::2], said[1::2]))[:turns]
        found.append([await _recorded_turn(options, writer, asked, answered) for asked, answered in pairs])
        wanted -= len(pairs)
        if wanted <= 0:
            break
    return found


async def _recorded_turn(options: Options, writer: Writer, asked: str, answered: str) -> Prompt:
    length = options.sharegpt_output_len
    return Prompt(asked, await writer.count(asked), await writer.count(answered) if length is None else length)


async def _custom(options: Options, writer: Writer) -> list[Conversation]:
    entries = _shuffled(options, list(_lines(_path(options))))[: options.num_prompts]
    return [[await _custom_turn(options, writer, source, entry)] for source, entry in entries]


async def _custom_turn(options: Options, writer: Writer, source: str, entry: Any) -> Prompt:
    content = entry.get("prompt") if isinstance(entry, dict) else None
    if not content or not (isinstance(content, str) or _is_token_ids(content)):
        raise ConfigError(f"{source}: should be an object with a `prompt`: a text, or a list of token ids")
    length = entry.get("output_tokens") if options.custom_output_len is None else options.custom_output_len
    if not isinstance(length, int) or length < 1:
        raise ConfigError(f"{source}: with --custom-output-len -1, `output_tokens` should be a whole number above 0")
    return Prompt(content, await writer.count(content) if isinstance(content, str) else len(content), length)


def _is_token_ids(content: object) -> bool:
    return isinstance(content, list) and all(type(token) is int and token >= 0 for token in content)


def _shuffled(options: Options, entries: list[Any]) -> list[Any]:
    if not options.disable_shuffle:
        _generator(options, "order").shuffle(entries)
    return entries


def _path(options: Options) -> Path:
    if options.dataset_path is None:
        raise ConfigError(f"--dataset-path: needed by --dataset-name {options.dataset_name}")
    return Path(options.dataset_path)


def _content(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--dataset-path {path}: {error}") from None


def _lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Each line's location, and what it holds."""
    for number, line in enumerate(_content(path).split("\n"), 1):
        if line.strip():
            source = f"--dataset-path {path}, line {number}"
            entry = _json(source, line)
            _check_entry(source, entry)
            yield source, entry


def _json(source: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{source}: is no JSON: {error}") from None


def _check_entry(source: str, entry: Any) -> None:
    try:
        check_sendable(entry)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _recorded(options: Options) -> list[list[str]]:
    """What was said in each conversation of a ShareGPT file, by turns; those without a response are passed over."""
    path = _path(options)
    entries = _json(f"--dataset-path {path}", _content(path))
    if not isinstance(entries, list):
        raise ConfigError(f"--dataset-path {path}: should be a list of {{conversations: [{{from, value}}]}}")
    found = []
    for number, entry in enumerate(entries):
        said = entry.get("conversations", []) if isinstance(entry, dict) else None
        if not isinstance(said, list) or not all(isinstance(turn, dict) for turn in said):
            raise ConfigError(f"--dataset-path {path}: entry {number} is no conversation")
        if not all(isinstance(turn.get("value"), str) for turn in said):
            raise ConfigError(f"--dataset-path {path}: entry {number} has a turn without a text")
        _check_entry(f"--dataset-path {path}: entry {number}", said)
        found.append([turn["value"] for turn in _exchanged(said)])
    return [said for said in found if len(said) >= 2 and all(said)]


def _exchanged(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """From the user's first turn on, as long as user and model take turns; what a system says is passed over. Where
    nothing says who speaks, the user begins."""
    if not any("from" in turn for turn in said):
        return said
    spoken = dropwhile(lambda turn: not _asks(turn), (turn for turn in said if turn.get("from") != "system"))
    return [turn for turn, _ in takewhile(lambda one: _asks(one[0]) == one[1], zip(spoken, cycle((True, False))))]


def _asks(turn: dict[str, Any]) -> bool:
    return turn.get("from") in USERS


Maker = Callable[[Options, Writer], Awaitable[list[Conversation]]]
MAKERS: dict[str, Maker] = {
    "random": _random,
    "sharegpt": _sharegpt,
    "custom": _custom,
    "prefix_repetition": _prefix_repetition,
    "multi-turn": _multi_turn,
}
