"""Tables and figures of pages that are made from results."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Report = Mapping[str, Any]
Lines = Iterator[str]
Cells = Sequence[object]


def table(*rows: Cells) -> Lines:
    """The first row is the head; columns after the first hold numbers."""
    head, *body = rows
    yield row(head)
    yield row(["---", *("---:" for _ in head[1:])])
    yield from map(row, body)


def row(cells: Cells) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def number(value: float) -> str:
    """Three digits that count, and all of those before the point."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def shown(figure: Report) -> str:
    return f"{number(figure['value'])} ({number(figure['low'])} to {number(figure['high'])})"
