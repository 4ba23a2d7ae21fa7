"""How long a decode step's kernels would take on an H200, on paper: from what programs of them take, and assumptions.

    python -m benchmarks.engine.gpu_estimate    # of benchmarks/results/MACHINE/suite/gpu-kernels.json

Nothing here was measured on a GPU. A kernel takes what the slowest of these takes: its bytes through the memory, its
bytes through the second cache, its products, and its programs' waits for loads, some side by side and the rest in
turns. What is done around the kernels (inputs sent, tokens drawn and brought back) is counted by itself: copies, and
launches by the host or in a graph. Of the host's share of a step, planning is not in it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.report import suite_folder

BATCHES = (1, 32, 256)
OPERATORS = {"plain": 19, "filtered": 34}  # of torch, that draw tokens in a graph; a test counts them
# upstream's default model: layers, heads, width, neurons of a head; weights and states in bfloat16
LAYERS, HEADS, WIDTH, NEURONS, VOCABULARY, ITEM = 6, 4, 256, 8192, 256, 2


@dataclass(frozen=True)
class Assumptions:
    memory_bytes_per_s: float = 4.8e12  # datasheet
    memory_share: float = 0.9  # that a kernel with enough loads in flight gets
    cache_bytes_per_s: float = 5.5e12  # the second cache
    products_per_s: float = 0.5 * 989e12  # half of the datasheet's dense rate of bfloat16
    multiprocessors: int = 132
    latency_s: float = 0.8e-6  # of a load, with others under way
    launch_s: float = 1.5e-6  # from one kernel of a graph to the next
    copy_s: float = 10e-6  # of a few bytes to or from the device, and the host's wait for it
    operator_s: float = 6e-6  # that the host takes to launch an operator, or a graph
    fired: float = 0.12  # of the neurons; 9 to 15 % in trained models of 25M to 100M


@dataclass(frozen=True)
class Design:
    """What differs between two states of the kernels."""

    part: int
    span: int
    side_by_side: Mapping[str, int]  # programs on a multiprocessor, by kernel
    attend_chain: int  # loads one after the other before a program's rows are under way
    attend_waits: float  # loads one after the other for each 8 pairs
    logits_waits: float  # the same, for all the width
    contract_waits: float  # the same, for each span


@dataclass(frozen=True)
class Kernel:
    name: str
    programs: int
    side_by_side: int
    waits: float  # loads that a program awaits one after the other
    memory_bytes: float = 0.0
    cache_bytes: float = 0.0
    products: float = 0.0

    def seconds(self, given: Assumptions) -> float:
        turns = max(1.0, self.programs / (given.multiprocessors * self.side_by_side))
        return given.launch_s + max(
            turns * self.waits * given.latency_s,
            self.memory_bytes / (given.memory_bytes_per_s * given.memory_share),
            (self.memory_bytes + self.cache_bytes) / given.cache_bytes_per_s,
            self.products / given.products_per_s,
        )


@dataclass(frozen=True)
class Around:
    """What a decode step takes beside the forward pass and the logits: none of it overlaps with them."""

    copies: int  # to the device and back
    launched: int  # by the host, one by one
    in_graph: int = 0

    def seconds(self, given: Assumptions) -> float:
        return self.copies * given.copy_s + self.launched * given.operator_s + self.in_graph * given.launch_s


# At commit 896ca448: tokens, positions and slots were sent one by one, and so was each parameter, from unpinned memory,
# by copies that wait for the device; tokens and what was finite came back. The host launched a graph, two copies before
# it and one after it, the logits, and the operators that draw.
AROUND_BEFORE = {"plain": Around(8, 5 + 18), "filtered": Around(15, 5 + 36)}
AROUND_NOW = {kind: Around(2, 1, operators) for kind, operators in OPERATORS.items()}


# As compiled at commit 4789805cb, before loads overlapped: in every iteration `contract` waited for a tile of 4 KB, and
# `attend_token` for eight entries of its list and then for their rows.
BEFORE = Design(128, 256, {"encode": 4, "attend_token": 5, "contract": 2}, 2, 2.0, 8.0, 8 * (WIDTH / 64 + 1))


def pairs_fired(given: Assumptions) -> float:
    return 1 - (1 - given.fired) ** 2


def layer_kernels(batch: int, design: Design, given: Assumptions) -> Iterator[Kernel]:
    """The kernels of one layer, for `batch` tokens of as many sequences."""
    parts, spans, tiles = NEURONS // design.part, NEURONS // design.span, math.ceil(batch / 64)
    matrix = HEADS * WIDTH * NEURONS
    fired, reads, shares = (
        batch * HEADS * NEURONS * ITEM,
        batch * HEADS * parts * WIDTH * 4,
        batch * HEADS * spans * WIDTH * 4,
    )
    side = design.side_by_side
    products = 2 * 64 * tiles * matrix
    yield Kernel(
        "encode", parts * HEADS * tiles, side["encode"], 2 + WIDTH / 32 / 2, matrix * ITEM,
        (tiles - 1) * matrix * ITEM + fired, products,
    )  # fmt: skip
    pairs = pairs_fired(given) * design.part / 2
    waits = design.attend_chain + math.ceil(pairs / 8) * design.attend_waits
    rows = 2 * batch * HEADS * NEURONS * pairs_fired(given) * WIDTH * ITEM
    yield Kernel("attend_token", parts * HEADS * batch, side["attend_token"], waits, rows, fired + reads)
    yield Kernel("normalise", HEADS * batch, 16, 3, cache_bytes=reads)
    yield Kernel(
        "contract", spans * HEADS * tiles, side["contract"], 2 + design.contract_waits, 2 * matrix * ITEM,
        2 * (tiles - 1) * matrix * ITEM + fired + shares, 2 * products,
    )  # fmt: skip
    yield Kernel("finish", batch, 16, 3, cache_bytes=shares)


def step_kernels(batch: int, design: Design, given: Assumptions) -> Iterator[tuple[Kernel, int]]:
    """With how often each is launched."""
    yield Kernel("embed", batch, 16, 3), 1
    yield Kernel("rotation", batch * NEURONS // 512, 8, 2, cache_bytes=4 * batch * NEURONS), 1
    for kernel in layer_kernels(batch, design, given):
        yield kernel, LAYERS
    head = VOCABULARY * WIDTH * ITEM
    yield Kernel("logits", VOCABULARY // 32 * math.ceil(batch / 32), 4, 2 + design.logits_waits, head), 1


def bound_s(batch: int, given: Assumptions) -> float:
    """What must move, at the datasheet's rate: each layer's matrices once; the rows that fired, read and written."""
    weights = 3 * HEADS * WIDTH * NEURONS * ITEM
    rows = 2 * batch * HEADS * NEURONS * pairs_fired(given) * WIDTH * ITEM
    return LAYERS * (weights + rows) / given.memory_bytes_per_s


def estimate(batch: int, design: Design, given: Assumptions) -> dict[str, Any]:
    by_kernel = {
        kernel.name: times * kernel.seconds(given) * 1e6 for kernel, times in step_kernels(batch, design, given)
    }
    total, bound = sum(by_kernel.values()), bound_s(batch, given) * 1e6
    return {
        "us": total,
        "percent_of_bound": 100 * bound / total,
        "tokens_per_s": batch / total * 1e6,
        "us_by_kernel": by_kernel,
    }


def design_of(kernels: Mapping[str, Mapping[str, int]], blocks: Mapping[str, int]) -> Design:
    """Of what was compiled: `in_flight` counts groups of loads, of which an iteration of `contract` is three, and one
    of the others two."""
    attend, contract, logits = kernels["attend_token"], kernels["contract"], kernels["logits"]
    iterations = blocks["span"] / blocks["contract_neurons"]
    return Design(
        part=blocks["part"],
        span=blocks["span"],
        side_by_side={name: each["programs"] for name, each in kernels.items()},
        attend_chain=4,
        attend_waits=1 / (attend["in_flight"] / 2 + 1),
        logits_waits=WIDTH / 64 / (logits["in_flight"] / 2 + 1),
        contract_waits=iterations / (contract["in_flight"] / 3 + 1),
    )


def estimates(kernels: Mapping[str, Mapping[str, int]], blocks: Mapping[str, int]) -> dict[str, Any]:
    """Before and after, by batch, with what was assumed."""
    given = Assumptions()
    designs = {"before": BEFORE, "now": design_of(kernels, blocks)}
    return {
        "assumptions": asdict(given),
        "around": {
            name: {kind: {**asdict(each), "us": each.seconds(given) * 1e6} for kind, each in kinds.items()}
            for name, kinds in {"before": AROUND_BEFORE, "now": AROUND_NOW}.items()
        },
        "by_batch": [
            {
                "batch": batch,
                "bound_us": bound_s(batch, given) * 1e6,
                **{name: estimate(batch, design, given) for name, design in designs.items()},
            }
            for batch in BATCHES
        ],
    }


def main() -> None:
    report = json.loads((suite_folder() / "gpu-kernels.json").read_text())
    for name, kinds in report["estimates"]["around"].items():
        print(
            f"around the kernels, {name}: " + ", ".join(f"{kind} {each['us']:.0f} us" for kind, each in kinds.items())
        )
    for each in report["estimates"]["by_batch"]:
        for name in ("before", "now"):
            found = each[name]
            kernels = ", ".join(f"{kernel} {us:.1f}" for kernel, us in found["us_by_kernel"].items())
            print(f"batch {each['batch']}, {name}: {found['us']:.0f} us, {found['percent_of_bound']:.0f} % ({kernels})")


if __name__ == "__main__":
    main()
