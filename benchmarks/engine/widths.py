"""Decode steps by the width of weights and states: their time, what they hold in memory, and the loss.

    python -m benchmarks.engine.widths               # batches of 1, 8 and 32, 15 rounds
    python -m benchmarks.engine.widths --rounds 5 --contexts 2

Variants take turns: float32, bfloat16 states, and both in bfloat16, with products of pairs where the processor has them
and widened as elsewhere. Writes `widths.json`: tokens/s, ratios to the same in float32 and of pairs to widened, bytes
of the packed matrices and of a state, and nats per token over some contexts of the validation text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels import simd_terms
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.cpu import CpuKernels
from benchmarks import ROOT
from benchmarks.common import figure, ratio, take_turns
from benchmarks.report import report_head, results_folder, write_report

CPU = torch.device("cpu")
MODEL = ROOT / "models" / "bdh-shakespeare"
TEXT = ROOT / "tests" / "data" / "shakespeare-validation.txt"
BATCHES = (1, 8, 32)
START = 64  # tokens that are in the states before steps are timed
STEPS = 128  # tokens of all sequences in a round
FLOAT32, WIDENED, PAIRS = "float32", "bfloat16, widened", "bfloat16"


@dataclass(frozen=True)
class Width:
    """One way to keep weights and states."""

    weights: torch.dtype
    states: torch.dtype
    pairs: bool = False


WIDTHS = {
    FLOAT32: Width(torch.float32, torch.float32),
    "bfloat16 states": Width(torch.float32, torch.bfloat16),
    WIDENED: Width(torch.bfloat16, torch.bfloat16),
    PAIRS: Width(torch.bfloat16, torch.bfloat16, pairs=True),
}


class Side:
    """A model at one width, with the states of as many sequences as the largest batch has."""

    def __init__(self, model: Path, width: Width, tokens: Tensor) -> None:
        loaded = load_model(model, width.weights, CPU)
        with mock.patch.object(simd_terms, "multiplies_pairs", return_value=width.pairs):
            self._kernels = CpuKernels(loaded.weights, loaded.config.suggested_window)
        self._states = StatePool(loaded.config, max(BATCHES), CPU, loaded.config.suggested_window, width.states).states
        self._states.zero_()
        self._tokens = tokens.view(max(BATCHES), -1)
        self._kernels.forward(self._states, self._batch(max(BATCHES), 0, START))
        self._position = START
        packed = self._kernels._packed
        self.bytes_of_matrices = sum(each.nbytes for each in (packed.encoder, packed.encoder_v, packed.decoder))
        self.bytes_of_a_state = self._states[0].nbytes

    def decode(self, batch: int) -> None:
        """Decodes STEPS tokens of a text that is given."""
        for _ in range(STEPS // batch):
            self._position = START + (self._position + 1) % (self._tokens.shape[1] - START)
            hidden = self._kernels.forward(self._states, self._batch(batch, self._position, 1))
            self._kernels.logits(hidden)

    def loss(self, contexts: int) -> float:
        """Nats per token over so many rows."""
        self._states.zero_()
        total = 0.0
        length = self._tokens.shape[1] - 1
        for row in self._tokens[:contexts]:
            batch = RaggedBatch(row[:-1], torch.arange(length), [0, length], [0])
            total += float(F.cross_entropy(self._kernels.logits(self._kernels.forward(self._states, batch)), row[1:]))
            self._states[0].zero_()
        return total / len(self._tokens[:contexts])

    def _batch(self, batch: int, start: int, length: int) -> RaggedBatch:
        return RaggedBatch(
            tokens=self._tokens[:batch, start : start + length].flatten(),
            positions=torch.arange(start, start + length).repeat(batch),
            bounds=[length * each for each in range(batch + 1)],
            slots=list(range(batch)),
        )


def main() -> None:
    arguments = parse()
    head = report_head(["torch", "numba"])
    read = list(arguments.text.read_bytes())[: max(BATCHES) * (arguments.text.stat().st_size // max(BATCHES))]
    tokens = torch.tensor(read)
    widths = {name: each for name, each in WIDTHS.items() if not each.pairs or simd_terms.multiplies_pairs()}
    with torch.inference_mode():
        sides = {name: Side(arguments.model, width, tokens) for name, width in widths.items()}
        variants: dict[str, Callable[[], object]] = {
            f"{name}, batch {batch}": partial(side.decode, batch) for name, side in sides.items() for batch in BATCHES
        }
        with tqdm(total=arguments.rounds, unit="round") as bar:
            times = take_turns(variants, arguments.rounds, tick=bar.update)
        held = {
            name: {
                "bytes_of_matrices": side.bytes_of_matrices,
                "bytes_of_a_state": side.bytes_of_a_state,
                "loss": side.loss(arguments.contexts),
            }
            for name, side in sides.items()
        }
    figures = {
        name: figure([STEPS / seconds for seconds in measured], "tokens/s", "higher")
        for name, measured in times.items()
    }
    ratios = {
        f"{name} / {base}, batch {batch}": asdict(
            ratio(times[f"{base}, batch {batch}"], times[f"{name}, batch {batch}"])
        )
        for base, names in ((FLOAT32, [*sides][1:]), (WIDENED, [PAIRS] if PAIRS in sides else []))
        for name in names
        for batch in BATCHES
    }
    report = {**head, "rounds": arguments.rounds, "widths": held, "figures": figures, "ratios_of_tokens_per_s": ratios}
    write_report(arguments.out / "widths.json", report)
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--contexts", type=int, default=32, help="of the text, over which the loss is measured")
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=TEXT, help="a file whose bytes are the tokens")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


if __name__ == "__main__":
    main()
