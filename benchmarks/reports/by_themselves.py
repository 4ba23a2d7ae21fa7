"""Sections of docs/performance.md on benchmarks that are run by themselves, not by `make bench`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.reports.cells import Lines, Report, shown, table


def by_sides(head: Sequence[str], found: Report, sides: Sequence[str]) -> Lines:
    """A row for each of what was found: the figures of its sides."""
    yield from table(head, *([name, *(shown(each[side]) for side in sides)] for name, each in found.items()))


def before(report: Report, link: str) -> Lines:
    yield "## Against earlier code"
    yield ""
    yield f"Tokens/s of commit {report['before'][:8]} and of {report['commit'][:8]}, by turns in one run, by the type"
    yield "of weights and states; over HTTP with the benchmark's client on the same cores:"
    yield ""
    sides = ("before", "now", "ratio")
    yield from by_sides(["", *sides], report["figures"], sides)


def step(report: Report, link: str) -> Lines:
    yield "## A step of decoding"
    yield ""
    yield "Microseconds of a step of the bundled model, in process. Around the forward pass and logits are drawing,"
    yield "planning, committing and handing over; `filtered` draws with top-k, top-p and min-p:"
    yield ""
    rows = []
    for name, each in report["now"].items():
        share = each["around"]["value"] / each["all"]["value"]
        rows.append([name, f"{each['us']['forward']:,.0f}", shown(each["around"]), f"{share:.1%}"])
    yield from table(["sequences", "forward pass", "around it", "share"], *rows)


def beside(report: Report, link: str) -> Lines:
    yield "## Beside another program"
    yield ""
    yield "The forward pass of a step, with a busy loop of another program on one of the cores. Two threads, of which"
    yield "one shares its core fairly with the loop, would take 1.33 times as long as alone:"
    yield ""
    sides = ("alone", "beside", "beside / alone")
    yield from by_sides(["sequences", "ms alone", "ms beside", "ratio"], report["now"], sides)


def peer(report: Report, link: str) -> Lines:
    yield "## Against bdh-cq"
    yield ""
    yield f"Generation of bdh-cq {report['versions']['bdh-cq']}, which keeps states too, with a model of the bundled"
    yield "one's sizes, in tokens/s of all sequences:"
    yield ""
    sides = ("bdh-cq", "bdh-batch", "times as fast")
    yield from by_sides(["sequences", "bdh-cq", "this engine", "times as fast"], report["batches"], sides)


def conversation(report: Report, link: str) -> Lines:
    yield "## Conversations"
    yield ""
    turns = report["turns"]
    yield f"The first token of the first and of the last of {turns} turns over `/v1/responses`, as its client gets it:"
    yield "in the server that has computed the turn before, and after its restart, once the states used last are read:"
    yield ""
    rows = []
    for found in report["by_length"]:
        of = f"{found['length']} letters a message, {found['prompt_tokens'][-1]:,} tokens in the end"
        for end, name in (("", "last_turn_to_first"), (", restarted", "last_turn_restarted_to_first")):
            first, last = (shown(found["figures"][f"{turn} turn{end}"]) for turn in ("first", "last"))
            rows.append([of + end, first, last, shown(found[name])])
    yield from table(["", "ms, first turn", "ms, last turn", "ratio"], *rows)


def frontend(report: Report, link: str) -> Lines:
    yield "## The way out, against earlier code"
    yield ""
    yield "Events/s of a server without a model, beside an older one's by turns: in step, where each token is an event"
    yield "of its own, and with several tokens ready at a time:"
    yield ""
    rows = []
    for name, ratio in report["events_ratio_to_before"].items():
        old, new = (shown(report["figures"][side]["events_per_second"]) for side in (f"{name}, before", name))
        rows.append([name, old, new, shown(ratio)])
    yield from table(["", "before", "now", "ratio"], *rows)


SECTIONS: dict[str, Callable[[Report, str], Lines]] = {
    "before": before,
    "peer": peer,
    "step": step,
    "beside": beside,
    "conversation": conversation,
    "frontend": frontend,
}
