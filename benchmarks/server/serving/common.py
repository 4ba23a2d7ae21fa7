"""What the scenarios share: texts, percentiles, and what keeps figures from being printed."""

from __future__ import annotations

import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bdh_batch.bench.strain import Watch
from benchmarks import ROOT
from benchmarks.served import Served

TEXT = (ROOT / "tests" / "data" / "shakespeare-validation.txt").read_text()
GREEDY: dict[str, Any] = {"temperature": 0.0}
Figures = dict[str, Any]
Window = tuple[float, float]


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of `values` that at least this share of them do not exceed."""
    ranked = sorted(values)
    return ranked[max(0, -int(-share * len(ranked) // 1) - 1)]


def text(draw: random.Random, length: int) -> str:
    """So many tokens (characters) of real text that begin like no other."""
    at = draw.randrange(len(TEXT))
    return (f"{draw.getrandbits(48):012x} " + TEXT[at:] + TEXT * (length // len(TEXT) + 1))[:length]


def strained(watch: Watch) -> Figures:
    """Whether the clients themselves were the bottleneck."""
    return asdict(watch.strain(()))


def refuse_unless(same: bool, what: str) -> None:
    if not same:
        sys.exit(f"{what}: no figure is worth printing.")


def print_scenario(name: str, figures: Figures) -> None:
    def short(value: object) -> object:
        if isinstance(value, dict):
            return {key: short(part) for key, part in value.items()}
        return round(value, 4) if isinstance(value, float) else value

    print(f"{name}: {short(figures)}", flush=True)


async def use_all_slots(server: Served, requests: int) -> None:
    draw = random.Random(0)
    for _ in range(2):
        await asyncio.gather(*[server.ask(prompt=text(draw, 64), max_tokens=2) for _ in range(requests)])
