"""Conversations that go on from saved states: what a turn computes, and how long its first token takes.

    python -m benchmarks.server.conversation             # 10 conversations of 20 turns, about two minutes
    python -m benchmarks.server.conversation --rounds 3

All turns of a conversation have messages of one length, over `/v1/responses` with `previous_response_id`. Each goes on
in one server, and is told a second time with a restart of the server before its last turn: its texts have to be the
same. A turn should compute its own tokens, and no earlier ones but the last that was drawn, which had not been read.
What is quoted is the ratio to the first turn's time to the first token, by conversation. Writes `conversation.json`;
exit code 1 if a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

RESPONSES = "/v1/responses"
ROOM = 64 * 2**30  # bytes: no state has to go
SETTLE_SECONDS = 0.5  # in which what a turn has left behind is written


@dataclass(frozen=True)
class Turn:
    """One turn: when its first token came, in seconds, what of its prompt was computed, and what was said."""

    first: float
    prompt_tokens: int
    cached_tokens: int
    text: str
    id: str


async def say(server: Served, conversation: int, number: int, before: str | None, tokens: int) -> Turn:
    message = f"Scene {conversation:04}, part {number:04}: what do you say to it?"
    body = {"input": message, "max_output_tokens": tokens, "temperature": 0, "previous_response_id": before}
    sent, events = await server.events(RESPONSES, **body)
    first = next(now for now, event in events if event["type"] == "response.output_text.delta")
    response = events[-1][1]["response"]
    usage = response["usage"]
    (item,) = response["output"]
    text = "".join(part["text"] for part in item["content"])
    cached = usage["input_tokens_details"]["cached_tokens"]
    return Turn(first - sent, usage["input_tokens"], cached, text, response["id"])


async def converse(
    server: Served, conversation: int, numbers: Sequence[int], before: str | None, tokens: int
) -> list[Turn]:
    turns: list[Turn] = []
    for number in numbers:
        turns.append(await say(server, conversation, number, turns[-1].id if turns else before, tokens))
        await asyncio.sleep(SETTLE_SECONDS)
    return turns


def play(rounds: int, turns: int, tokens: int) -> tuple[list[list[Turn]], list[list[Turn]]]:
    """The turns of each conversation: uninterrupted, and with a restart before the last turn."""

    async def before_restart(server: Served) -> tuple[list[list[Turn]], list[list[Turn]]]:
        await converse(server, rounds, range(2), None, tokens)  # warms up
        whole = [await converse(server, each, range(turns), None, tokens) for each in range(rounds)]
        return whole, [await converse(server, each, range(turns - 1), None, tokens) for each in range(rounds)]

    async def after_restart(server: Served) -> None:
        await converse(server, rounds, range(2), None, tokens)
        for number, half in enumerate(halves):
            half += await converse(server, number, [turns - 1], half[-1].id, tokens)

    with tempfile.TemporaryDirectory() as folder:
        options = f"store.path={folder}", f"store.max_bytes={ROOM}"
        with served(*options) as server:
            whole, halves = uvloop.run(before_restart(server))
        with served(*options) as server:
            uvloop.run(after_restart(server))
    return whole, halves


def summary(whole: Sequence[Sequence[Turn]], restarted: Sequence[Sequence[Turn]]) -> dict[str, Any]:
    first = [turns[0].first for turns in whole]
    computed = [[turn.prompt_tokens - turn.cached_tokens for turn in turns] for turns in whole]
    return {
        "figures": {
            "first turn": figure([1000 * each for each in first], "ms", "lower"),
            "last turn": figure([1000 * turns[-1].first for turns in whole], "ms", "lower"),
            "last turn, restarted": figure([1000 * turns[-1].first for turns in restarted], "ms", "lower"),
        },
        "last_turn_to_first": asdict(ratio([turns[-1].first for turns in whole], first)),
        "last_turn_restarted_to_first": asdict(ratio([turns[-1].first for turns in restarted], first)),
        "prompt_tokens": [turn.prompt_tokens for turn in whole[0]],
        "computed_tokens_most": [max(each[number] for each in computed) for number in range(len(whole[0]))],
        "computed_tokens_restarted": max(turns[-1].prompt_tokens - turns[-1].cached_tokens for turns in restarted),
        "texts_differ": sum(a.text != b.text for one, other in zip(whole, restarted) for a, b in zip(one, other)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10, help="conversations")
    parser.add_argument("--turns", type=int, default=20, help="of each")
    parser.add_argument("--tokens", type=int, default=24, help="of each response")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    head = report_head(["torch", "numba", "uvicorn", "uvloop"])
    whole, restarted = play(chosen.rounds, chosen.turns, chosen.tokens)
    report = {**head, "rounds": chosen.rounds, "turns": chosen.turns, "tokens": chosen.tokens}
    report |= summary(whole, restarted)
    write_report(chosen.out / "conversation.json", report)
    for name, value in report["figures"].items():
        print(f"{name}: {value['value']:.6g} {value['unit']}")
    for name in (
        "last_turn_to_first",
        "last_turn_restarted_to_first",
        "computed_tokens_most",
        "computed_tokens_restarted",
        "texts_differ",
    ):
        print(f"{name}: {report[name]}")
    if report["texts_differ"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
