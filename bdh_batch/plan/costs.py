"""What a token costs, in bytes and operations, from the shape of a model; `kernels/README.md` derives it.

Left out, as they are small: scores within a tile of a prompt, norms, sampling, and states that are cached or swapped.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from bdh_batch.checkpoint.config import BDHConfig, bytes_per_sequence
from bdh_batch.plan.flags import Flags

STATES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WEIGHTS = {**STATES, "float16": torch.float16}
MOST = 10**12
SLOWEST = 0.001  # tokens/s
CHUNK = 256  # tokens of a prompt for which a state is read and written once
# Of the neurons, those that fire for a token, with the bundled model
# (benchmarks/results/amd-epyc-2-threads/kernels-cpu.json).
ACTIVE = 0.216


@dataclass(frozen=True)
class Load(Flags):
    """What is wanted, with the server's own defaults.

    `rate` is tokens/s that each of the `streams` gets; each is succeeded by another when it ends.
    """

    streams: int = 1
    rate: float = 1.0
    prompt_tokens: int = 256
    answer_tokens: int = 256
    utilization: float = 0.8
    active_fraction: float = ACTIVE
    state_dtype: str = "float32"
    dtype: str = "float32"
    window: int = 0  # tokens, 0 is none

    def __post_init__(self) -> None:
        for name, least in (("streams", 1), ("answer_tokens", 1), ("prompt_tokens", 0), ("window", 0)):
            self.refuse_unless(name, least <= getattr(self, name) <= MOST, f"from {least} to {MOST:,}")
        self.refuse_unless("window", self.window % 2 == 0, "an even number, as two blocks share it")
        self.refuse_unless("rate", SLOWEST <= self.rate < math.inf, f"at least {SLOWEST}, and finite")
        self.refuse_unless("utilization", 0 < self.utilization < 1, "above 0 and below 1")
        self.refuse_unless("active_fraction", 0 < self.active_fraction <= 1, "above 0, and at most 1")
        self.refuse_unless("state_dtype", self.state_dtype in STATES, f"one of {', '.join(STATES)}")
        self.refuse_unless("dtype", self.dtype in WEIGHTS, f"one of {', '.join(WEIGHTS)}")


@dataclass(frozen=True)
class Costs:
    """Bytes and floating-point operations."""

    state_bytes: int  # of a sequence
    weight_bytes: int  # in memory
    weight_traffic: float  # of a step, whoever is in it
    state_traffic: float  # of a token that is decoded, read and written
    state_flops: float
    product_flops: float
    prompt_traffic: float  # of a prompt's token
    prompt_flops: float


def costs_of(config: BDHConfig, load: Load, skips_gates: bool) -> Costs:
    """
    Args:
        skips_gates: products are only made for neurons that fired, and for those that passed their gates.
    """
    elements, fired = config.state_elements, load.active_fraction  # elements are L · n · D, an encoder's for each layer
    pairs = 1 - (1 - fired) ** 2  # one of the two fires
    state, weight = STATES[load.state_dtype].itemsize, WEIGHTS[load.dtype].itemsize
    parts = 1 + fired + fired**2 if skips_gates else 3.0  # of the products with encoder, encoder_v, decoder
    head = config.vocab_size * config.n_embd
    # At a block's first token both sums are read and written.
    shift = 4 * state * elements / (load.window / 2) if load.window else 0.0
    layers = 2 * parts * elements
    in_prompt = pairs if skips_gates else 1.0  # the GPU's are products over all neurons
    return Costs(
        state_bytes=bytes_per_sequence(config, load.window, STATES[load.state_dtype]),
        weight_bytes=weight * sum(math.prod(shape) for shape in config.shapes().values()),
        weight_traffic=weight * (3 * elements + head),  # too many for a cache, every layer reads them again
        state_traffic=2 * state * pairs * elements + shift,
        state_flops=4 * pairs * elements,
        product_flops=layers + 2 * head,
        prompt_traffic=2 * state * elements / CHUNK + shift,
        prompt_flops=layers + 4 * in_prompt * elements,
    )
