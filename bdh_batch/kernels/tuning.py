"""Block sizes of the Triton kernels: defaults, candidates, what was measured best on a GPU, and the search for it.

Block sizes fix the order of summation, so one set serves all batch sizes of a model; another set gives other bits.
Knows nothing about GPUs: who searches brings the stopwatch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bdh_batch.errors import ConfigError

FILE = Path(__file__).parent / "tuned.json"
# What registers and shared memory hold. Products of float32 work with several copies of their operands.
LINE = 512  # bytes of a row of the encoder's tile
STATE_TILE = 1 << 14  # bytes of the tile of a state that a segment is taken through, if it were as wide as the weights
CHUNK_LINE = 64  # bytes of a column of a segment's tile, as wide as the weights
ROWS_TILE = 1 << 13  # bytes of a tile of gates, and of one of the decoder
SUM_TILE = 1 << 14  # elements of a tile of the decoder's sums
SMALLEST = 16  # rows, columns and depth of the smallest product that tensor cores do
# A product of float32 is three, of operands split in two, and takes the registers of several tiles.
FULL_SUM_TILE, FULL_DEPTH, FULL_WARPS = SUM_TILE // 2, 64, 4


@dataclass(frozen=True)
class Blocks:
    """How the kernels cut their work, all powers of two; `warps` and `stages` (of loads in flight) are of a program."""

    part: int = 256  # neurons of a head that one program takes through the state, and the encoder's columns
    encode_tokens: int = 64
    encode_depth: int = 32
    encode_warps: int = 8
    encode_stages: int = 3
    token_pairs: int = 8  # of state rows in one iteration
    token_warps: int = 4
    token_stages: int = 3
    chunk_tokens: int = 32
    chunk_values: int = 64  # columns of the state that one program keeps
    chunk_warps: int = 8
    chunk_stages: int = 1
    span: int = 256  # neurons whose share of the decoder's sum one program adds up
    contract_tokens: int = 64
    contract_neurons: int = 32
    contract_depth: int = 512  # of one product of a gate: the whole width, but for float32
    contract_warps: int = 8
    contract_stages: int = 3

    def fitted(self, width: int, neurons: int, itemsize: int) -> Blocks:
        """None larger than the model can fill, or than registers and shared memory hold with weights of `itemsize`
        bytes, in two programs side by side."""
        whole, depth, full = at_least_smallest(neurons), at_least_smallest(width), itemsize == 4
        part, span = min(self.part, whole, LINE // itemsize), min(self.span, whole)
        return replace(
            self,
            part=part,
            encode_depth=min(self.encode_depth, depth),
            encode_warps=min(self.encode_warps, FULL_WARPS) if full else self.encode_warps,
            token_pairs=min(self.token_pairs, part // 2),
            chunk_tokens=min(self.chunk_tokens, CHUNK_LINE // itemsize),
            chunk_values=min(self.chunk_values, depth, max(SMALLEST, STATE_TILE // (itemsize * part))),
            span=span,
            contract_tokens=min(self.contract_tokens, (FULL_SUM_TILE if full else SUM_TILE) // depth),
            contract_neurons=min(self.contract_neurons, span, max(SMALLEST, ROWS_TILE // (itemsize * depth))),
            contract_depth=min(self.contract_depth, depth, FULL_DEPTH) if full else depth,
            contract_warps=min(self.contract_warps, FULL_WARPS) if full else self.contract_warps,
        )


# Kernel by kernel, in the order in which a step runs them. What is tuned together changes together.
CANDIDATES: dict[str, list[dict[str, int]]] = {
    "attend_token": [
        {"part": 128, "encode_warps": 4},
        {"token_pairs": 4, "token_warps": 4},
        {"token_pairs": 4, "token_warps": 2},
        {"token_pairs": 16, "token_warps": 8},
        {"token_stages": 2},
        {"token_stages": 4},
    ],
    "encode": [
        {"encode_tokens": 16, "encode_depth": 64, "encode_warps": 4, "encode_stages": 3},
        {"encode_tokens": 32, "encode_depth": 64, "encode_warps": 8, "encode_stages": 3},
        {"encode_tokens": 64, "encode_depth": 32, "encode_warps": 8, "encode_stages": 4},
    ],
    "contract": [
        {"span": 128},
        {"span": 512},
        {"contract_tokens": 32, "contract_warps": 4},
        {"contract_tokens": 16, "contract_warps": 4, "contract_stages": 4},
        {"contract_neurons": 16, "contract_stages": 4},
    ],
    "attend_chunk": [
        {"chunk_tokens": 16},
        {"chunk_values": 16},
        {"part": 128, "encode_warps": 4, "chunk_values": 64},
        {"part": 128, "encode_warps": 4, "chunk_values": 32, "chunk_warps": 4},
    ],
}


def at_least_smallest(size: int) -> int:
    """The power of two that holds `size`, and can be a side of a product."""
    return max(SMALLEST, 1 << (size - 1).bit_length())


def key_of(gpu: str, heads: int, width: int, neurons: int, dtype: str) -> str:
    return f"{gpu}, {heads} heads of {neurons} neurons, width {width}, {dtype}"


def load_blocks(key: str, file: Path = FILE) -> Blocks:
    """What was measured best for this GPU and model shape; the defaults where nothing was.

    Raises:
        ConfigError: the file is damaged.
    """
    if not file.is_file():
        return Blocks()
    try:
        return Blocks(**json.loads(file.read_text("utf-8")).get(key, {}))
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(f"{file}: not block sizes ({error}); delete it, or tune again with make gpu-check") from error


def save_blocks(key: str, blocks: Blocks, file: Path = FILE) -> None:
    known = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    file.write_text(json.dumps({**known, key: asdict(blocks)}, indent=2, sort_keys=True) + "\n", "utf-8")


def candidates(best: Blocks, kernel: str) -> Iterator[Blocks]:
    """Other block sizes for one kernel, the rest as it is."""
    for change in CANDIDATES[kernel]:
        other = replace(best, **change)
        if other != best:
            yield other


def search(measure: Callable[[Blocks], float], start: Blocks | None = None) -> Blocks:
    """The best blocks, kernel by kernel. `measure` gives a cost; infinity for what the GPU cannot run."""
    best = start or Blocks()
    least = measure(best)
    for kernel in CANDIDATES:
        for other in candidates(best, kernel):
            cost = measure(other)
            if cost < least:
                best, least = other, cost
    return best
