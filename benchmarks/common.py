"""What the benchmarks share: taking turns, the machine's own rates and description, the baselines, the report.

Needs torch alone, so that it also runs on a bare GPU machine.
"""

from __future__ import annotations

import json
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bdh_batch.kernels.base import RaggedBatch, Weights
from bdh_batch.kernels.torch_reference import layer_norm, project, rotate, rotation

Variants = Mapping[str, Callable[[], object]]
Times = dict[str, list[float]]
INTERVAL = {"value", "low", "high"}  # the keys of what `interval` gives, and `ratio` as a dictionary
FIGURE = INTERVAL | {"unit", "better"}
REST = 0.03  # seconds: torch's threads and Numba's are two pools, and idle ones spin for a while


def wall_clock(variant: Callable[[], object]) -> float:
    time.sleep(REST)
    start = time.perf_counter()
    variant()
    return time.perf_counter() - start


def take_turns(
    variants: Variants,
    repeats: int,
    clock: Callable[[Callable[[], object]], float] = wall_clock,
    tick: Callable[[], object] = lambda: None,
) -> Times:
    """The seconds of every run of each variant; they alternate, so that what else the machine does meets all of them.

    Args:
        clock: runs a variant and says how long it took.
        tick: is called after each round, for a progress bar.
    """
    for variant in variants.values():
        variant()
        variant()
    times: Times = {name: [] for name in variants}
    for _ in range(repeats):
        for name, variant in variants.items():
            times[name].append(clock(variant))
        tick()
    return times


def medians(times: Times) -> dict[str, float]:
    return {name: statistics.median(measured) for name, measured in times.items()}


def alternate(
    variants: Variants, repeats: int, clock: Callable[[Callable[[], object]], float] = wall_clock
) -> dict[str, float]:
    """The median seconds of each variant; they take turns."""
    return medians(take_turns(variants, repeats, clock))


@dataclass(frozen=True)
class Ratio:
    """A ratio of medians, and the interval that holds 95 % of those of resampled rounds.

    It never leaves the range of the rounds, and where they are few, it holds the true ratio less often than that.
    """

    value: float
    low: float
    high: float


def ratio(upper: Sequence[float], lower: Sequence[float], draws: int = 2000) -> Ratio:
    """Of two variants that took turns. Rounds are drawn again as pairs: what slows a round slows both its variants."""
    pairs = list(zip(upper, lower, strict=True))
    chance = random.Random(0)

    def of(drawn: Sequence[tuple[float, float]]) -> float:
        return statistics.median(a for a, _ in drawn) / statistics.median(b for _, b in drawn)

    found = sorted(of(chance.choices(pairs, k=len(pairs))) for _ in range(draws))
    return Ratio(of(pairs), found[int(0.025 * draws)], found[int(0.975 * draws) - 1])


def figure(rounds: Sequence[float], unit: str, better: str, draws: int = 2000) -> dict[str, Any]:
    """A measured quantity as reports hold it: the median of its rounds, and the interval that holds 95 % of those of
    resampled rounds. `compare.py` knows it by its keys.

    Medians of n resampled rounds never leave the rounds' range, which holds the true one with a chance of 1 - 2^(1-n):
    75 % with 3 rounds. Nor is in it what drifts from one run to the next.

    Args:
        better: "higher" or "lower".
    """
    return {**interval(rounds, draws), "unit": unit, "better": better, "rounds": list(rounds)}


def interval(rounds: Sequence[float], draws: int = 2000) -> dict[str, float]:
    """The median, and between what 95 % of those of resampled rounds lie."""
    chance = random.Random(0)
    found = sorted(statistics.median(chance.choices(rounds, k=len(rounds))) for _ in range(draws))
    low, high = found[int(0.025 * draws)], found[int(0.975 * draws) - 1]
    return {"value": statistics.median(rounds), "low": low, "high": high}


def relative_error(mine: Iterable[Tensor], right: Iterable[Tensor]) -> float:
    """The largest over some tensors, in the Frobenius norm; NaN where any is."""
    errors = [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(mine, right, strict=True)]
    return max(errors) if all(error == error for error in errors) else float("nan")


def dense_batched(weights: Weights, states: Tensor, batch: RaggedBatch) -> Tensor:
    """A decode step of all sequences [B, L, h, N, D] in torch, as public stateful implementations write it.

    Per layer `y = q @ S` and `S += q.mT @ x` for the whole batch in one tensor, which moves the whole state.
    """
    cos, sin = rotation(weights.frequencies, batch.positions)
    x = layer_norm(F.embedding(batch.tokens, weights.embed).float())
    for layer in range(weights.layers):
        fired = project(x, weights.encoder).relu()
        q = rotate(fired, cos, sin).transpose(0, 1)  # [B, h, N]
        y = (q[:, :, None] @ states[:, layer]).squeeze(2)
        flat = states[:, layer].view(len(x), -1, x.shape[-1])
        flat.baddbmm_(q.reshape(len(x), -1, 1).to(flat.dtype), x[:, None].to(flat.dtype))
        gated = fired * project(layer_norm(y).transpose(0, 1), weights.encoder_v).relu()
        x = layer_norm(x + layer_norm(project(gated.transpose(0, 1).flatten(1), weights.decoder)))
    return project(x, weights.lm_head)


def recompute(weights: Weights, contexts: Tensor, together: int = 4) -> Tensor:
    """The next token's logits for contexts [B, T], from their start, as upstream's `generate` does for every token.

    Args:
        together: contexts computed at once, as many as fit.
    """
    length = contexts.shape[1]
    cos, sin = rotation(weights.frequencies, torch.arange(length, device=contexts.device))
    rows = []
    for tokens in torch.split(contexts, together):
        x = layer_norm(weights.embed[tokens].float())[:, None]
        for _ in range(weights.layers):
            fired = project(x, weights.encoder).relu()
            q = rotate(fired, cos, sin)
            y = layer_norm((q @ q.mT).tril(-1) @ x)
            gated = fired * project(y, weights.encoder_v).relu()
            z = project(gated.transpose(1, 2).reshape(len(tokens), 1, length, -1), weights.decoder)
            x = layer_norm(x + layer_norm(z))
        rows.append(project(x[:, 0, -1], weights.lm_head))
    return torch.cat(rows)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except FileNotFoundError:
        return platform.processor()
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def machine_slug() -> str:
    """This machine as the name of a folder, as in amd-epyc-2-threads."""
    return "-".join(re.findall("[a-z0-9]+", f"{cpu_name()} {torch.get_num_threads()} threads".lower()))


def report_head(packages: Sequence[str]) -> dict[str, Any]:
    """What every report begins with: the command, the day, the machine and the versions."""
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "machine": {"cpu": cpu_name(), "threads": torch.get_num_threads(), "system": platform.platform()},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def write_json(file: Path, report: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report, indent=2) + "\n")
