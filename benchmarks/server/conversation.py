"""Conversations that go on from saved states: what a turn computes, and how long its first token takes.

    python -m benchmarks.server.conversation             # 24 conversations of 20 turns for each length, six minutes
    python -m benchmarks.server.conversation --rounds 4 --lengths 48

All turns of a conversation have messages of one length, a few words or a few sentences, over `/v1/responses` with
`previous_response_id`. The last one is asked for twice, from the same turn before: in the server in which the others
were, and after a restart of it, once that has read in advance the states that were used last. Its texts have to be the
same. A turn should compute its own tokens, and no earlier ones but the last that was drawn, which had not been read.

First turns and last ones take turns, before a restart and after it, and each waits until the states of those before it
are written. What is quoted is the ratio of a last turn's time to the first token to that of the first turn beside it.
Writes `conversation.json`; exit code 1 if a text differs.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import uvloop

from benchmarks.common import figure, ratio
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, served

RESPONSES = "/v1/responses"
ROOM = 64 * 2**30  # bytes: no state has to go
LOOK_SECONDS = 0.05  # between two looks whether states are written
SETTLE_SECONDS = 0.3  # after that, for what else a turn has left to do
WRITE_SECONDS = 300.0  # in which a state is written
READ_IN_ADVANCE = "were read in advance"  # the server says so once of all states that there is room for
READ_SECONDS = 60.0  # in which they are
WARM = 10_000  # the number of the first conversation that nothing is measured of
NEW = 1_000  # of those of which there is a first turn, and no more
MORE = " Say what you see, what you hear, and what you would do if you were there."


@dataclass(frozen=True)
class Turn:
    """One turn: when its first token came, in seconds, what of its prompt was computed, and what was said."""

    first: float
    prompt_tokens: int
    cached_tokens: int
    text: str
    id: str

    @property
    def computed(self) -> int:
        return self.prompt_tokens - self.cached_tokens


class Speaker:
    """Has conversations with one server, in messages of so many letters."""

    def __init__(self, server: Served, tokens: int, length: int) -> None:
        self._server = server
        self._tokens = tokens
        self._length = length

    async def say(self, conversation: int, number: int, before: str | None) -> Turn:
        """One turn. Returns once its state is written."""
        states = (await self._server.metrics())["bdh_store_states"]
        message = f"Scene {conversation:05}, part {number:04}: what do you say to it?"
        message += (MORE * (self._length // len(MORE) + 1))[: self._length - len(message)]
        body = {"input": message, "max_output_tokens": self._tokens, "temperature": 0, "previous_response_id": before}
        sent, events = await self._server.events(RESPONSES, **body)
        first = next(now for now, event in events if event["type"] == "response.output_text.delta")
        response = events[-1][1]["response"]
        usage = response["usage"]
        (item,) = response["output"]
        text = "".join(part["text"] for part in item["content"])
        async with asyncio.timeout(WRITE_SECONDS):
            while (await self._server.metrics())["bdh_store_states"] <= states:  # noqa: ASYNC110 - of another process
                await asyncio.sleep(LOOK_SECONDS)
        cached = usage["input_tokens_details"]["cached_tokens"]
        return Turn(first - sent, usage["input_tokens"], cached, text, response["id"])

    async def measured(self, conversation: int, number: int, before: str | None) -> Turn:
        await asyncio.sleep(SETTLE_SECONDS)
        return await self.say(conversation, number, before)

    async def forget(self, turn: Turn) -> None:
        """Deletes a response that nothing goes on from, so that the files of states stay in the system's memory."""
        status, content = await self._server.whole("DELETE", f"{RESPONSES}/{turn.id}")
        if status != 200:
            raise RuntimeError(f"status {status}: {content[-500:]!r}")

    async def warm_up(self) -> None:
        begun = await self.say(WARM, 0, None)
        await self.say(WARM, 1, begun.id)

    async def converse(self, conversation: int, count: int) -> list[Turn]:
        """The turns of a conversation. The first and the last are measured, and the last but one stays stored."""
        turns = [await self.measured(conversation, 0, None)]
        for number in range(1, count - 1):
            turns.append(await self.say(conversation, number, turns[-1].id))
            await self.forget(turns[-2])
        turns.append(await self.measured(conversation, count - 1, turns[-1].id))
        await self.forget(turns[-1])
        return turns

    async def go_on(self, conversation: int, turns: Sequence[Turn]) -> tuple[Turn, Turn]:
        """The first turn of another conversation, and the last one of this."""
        first = await self.measured(NEW + conversation, 0, None)
        last = await self.measured(conversation, len(turns) - 1, turns[-2].id)
        for turn in (first, last, turns[-2]):
            await self.forget(turn)
        return first, last


def play(
    rounds: int, turns: int, tokens: int, restarts: int, length: int
) -> tuple[list[list[Turn]], list[tuple[Turn, Turn]]]:
    """The turns of so many conversations; and for each, after one of the restarts, another first turn and its last."""
    whole: list[list[Turn]] = []
    after: dict[int, tuple[Turn, Turn]] = {}

    async def before_restart(server: Served) -> None:
        speaker = Speaker(server, tokens, length)
        await speaker.warm_up()
        whole.extend([await speaker.converse(number, turns) for number in range(rounds)])

    async def after_restart(server: Served, numbers: range) -> None:
        speaker = Speaker(server, tokens, length)
        await speaker.warm_up()
        for number in numbers:
            after[number] = await speaker.go_on(number, whole[number])

    with tempfile.TemporaryDirectory() as folder:
        options = f"store.path={folder}/store", f"store.max_bytes={ROOM}"
        log = Path(folder, "log")
        with served(*options) as server:
            uvloop.run(before_restart(server))
        for restart in range(restarts):
            with served(*options, log=log) as server:
                wait_until_read(log)
                uvloop.run(after_restart(server, range(restart, rounds, restarts)))
    return whole, [after[number] for number in range(rounds)]


def wait_until_read(log: Path) -> None:
    """Returns once a server has read all states in advance that there is room for."""
    end = time.monotonic() + READ_SECONDS
    while READ_IN_ADVANCE not in log.read_text():
        if time.monotonic() > end:
            raise RuntimeError(f"no state was read in advance: {log.read_text()}")
        time.sleep(LOOK_SECONDS)


def summary(whole: Sequence[Sequence[Turn]], after: Sequence[tuple[Turn, Turn]]) -> dict[str, Any]:
    first, last = ([turns[at].first for turns in whole] for at in (0, -1))
    first_restarted, restarted = ([turns[at].first for turns in after] for at in (0, 1))
    named = {
        "first turn": first,
        "last turn": last,
        "first turn, restarted": first_restarted,
        "last turn, restarted": restarted,
    }
    return {
        "figures": {name: figure([1000 * each for each in times], "ms", "lower") for name, times in named.items()},
        "last_turn_to_first": asdict(ratio(last, first)),
        "last_turn_restarted_to_first": asdict(ratio(restarted, first_restarted)),
        "prompt_tokens": [turn.prompt_tokens for turn in whole[0]],
        "computed_tokens_most": [max(turn.computed for turn in each) for each in zip(*whole)],
        "computed_tokens_restarted": max(turn.computed for _, turn in after),
        "texts_differ": sum(turns[-1].text != turn.text for turns, (_, turn) in zip(whole, after)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=24, help="conversations")
    parser.add_argument("--turns", type=int, default=20, help="of each")
    parser.add_argument("--tokens", type=int, default=24, help="of each response")
    parser.add_argument("--lengths", type=int, nargs="+", default=[48, 240], help="letters of messages, from 48 on")
    parser.add_argument("--restarts", type=int, default=4, help="of the server; a part of them go on after each")
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args(argv)
    head = report_head(["torch", "numba", "uvicorn", "uvloop"])
    report = {**head, "rounds": chosen.rounds, "turns": chosen.turns, "tokens": chosen.tokens}
    report["restarts"] = restarts = min(chosen.restarts, chosen.rounds)
    report["by_length"] = []
    for length in chosen.lengths:
        found = summary(*play(chosen.rounds, chosen.turns, chosen.tokens, restarts, length))
        report["by_length"].append({"length": length, **found})
        show(length, found)
    write_report(chosen.out / "conversation.json", report)
    if any(found["texts_differ"] for found in report["by_length"]):
        sys.exit(1)


def show(length: int, found: Mapping[str, Any]) -> None:
    print(f"messages of {length} letters")
    for name, value in found["figures"].items():
        print(f"{name}: {value['value']:.6g} {value['unit']}")
    for name in (
        "last_turn_to_first",
        "last_turn_restarted_to_first",
        "computed_tokens_most",
        "computed_tokens_restarted",
        "texts_differ",
    ):
        print(f"{name}: {found[name]}")


if __name__ == "__main__":
    main()
