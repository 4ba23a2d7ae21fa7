"""Sections of docs/performance.md on what was tried, and left out of the server unless they say otherwise."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.reports.cells import Lines, Report, number, table

MOST = 0.002  # nats, by which narrow states may be worse


def int8_states(report: Report, link: str) -> Lines:
    """Differences to float32 by position."""
    yield "## Tried: states of int8"
    yield ""
    count, length = report["contexts"], report["tokens_of_a_context"]
    yield f"Loss in nats a byte, over {count} × {length:,} bytes: that of states in float32, and what others"
    yield "differ by. Those of int8 have a scale for each row. With feedback, what was rounded away is kept in another"
    yield "byte, so they take as many as bfloat16. To be served, states may cost at most"
    yield f"{MOST:g}. The server has none of int8."
    for window in dict.fromkeys(row["window"] for row in report["losses"]):
        rows = [row for row in report["losses"] if row["window"] == window]
        first = rows[0]["by_position"]
        yield ""
        head = f"window of {window}" if window else "without a window"
        yield from table(
            [head, "all", *first],
            ["float32", f"{rows[0]['loss']:.4f}", *(f"{loss:.3f}" for loss in first.values())],
            *(
                [row["states"], f"{row['loss'] - rows[0]['loss']:+.4f}"]
                + [f"{loss - first[at]:+.4f}" for at, loss in row["by_position"].items()]
                for row in rows[1:]
            ),
        )


def ring(report: Report, link: str) -> Lines:
    yield "## Tried: states written every R tokens"
    yield ""
    yield "The tokens since the last write are kept in a ring, and a token reads those besides the state's rows. By the"
    yield "bytes that move, a pass over the states would be faster. But reading the rows alone takes more than half of"
    yield "what reading and writing them in place does, and adding the ring to the state is bound by computing, as a"
    yield "prompt is. µs a token of the pass, and how many times as fast as in place it is:"
    yield ""
    rows = [
        [
            each["batch"],
            each["ring"],
            *(number(each[name]["value"]) for name in ("in_place", "read", "dots", "flush")),
            number(each["by_bytes"]),
            f"{number(each['ratio']['value'])} ({number(each['ratio']['low'])} to {number(each['ratio']['high'])})",
        ]
        for each in report["rings"]
    ]
    head = ["sequences", "R", "in place", "rows read", "ring read", "ring written to the state", "by bytes", "measured"]
    yield from table(head, *rows)


SECTIONS: dict[str, Callable[[Report, str], Lines]] = {"int8-states": int8_states, "ring": ring}
