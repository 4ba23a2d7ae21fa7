"""What machines can do: datasheets of some GPUs, and this machine as it was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import linear_regression
from typing import Any

import torch

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.plan.costs import Costs, Load, costs_of
from bdh_batch.system.device_memory import free_memory
from bdh_batch.system.documents import LARGEST_JSON, Malformed, parse_json, read_text

ASSUMED_SHARE = 0.5  # of a datasheet's rates, as no kernel of ours has been measured on a GPU
LAUNCHES = 5e-4  # seconds: a CUDA graph, sampling and the way to the host and back; assumed
GB, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Machine:
    """Rates per second, as published by the maker or measured; the shares are what the kernels reach of them."""

    name: str
    basis: str  # of the figures
    memory: float  # bytes
    bandwidth: float  # bytes
    flops_16: float  # of products of 16-bit weights, dense
    flops_32: float  # of products of float32 weights
    vector_flops: float  # of what is no product: the state pass of a token
    host_link: float | None  # bytes, one way; None: states are in the host's memory anyway
    step_seconds: float = LAUNCHES  # of a step, whatever is in it
    bandwidth_share: float = ASSUMED_SHARE
    compute_share: float = ASSUMED_SHARE
    skips_gates: bool = False  # only neurons that fired are gated, and only what passed is decoded


def on_paper(
    name: str, *, gb: float, gb_s: float, tflops_16: float, tflops_tf32: float, tflops_32: float, link_gb_s: float
) -> Machine:
    basis = (
        f"on paper: {name}'s datasheet, of whose rates the kernels are assumed to reach {ASSUMED_SHARE:.0%}; "
        "nothing of it was run there"
    )
    return Machine(
        name,
        basis,
        memory=gb * GB,
        bandwidth=gb_s * GB,
        flops_16=tflops_16 * TERA,
        flops_32=tflops_tf32 * TERA / 3,  # a product of float32 is three of TF32
        vector_flops=tflops_32 * TERA,
        host_link=link_gb_s * GB,
    )


# Dense products, not "with sparsity"; of the host's link one of its two directions.
DATASHEETS = {
    machine.name: machine
    for machine in (
        # H200 SXM, https://www.nvidia.com/en-us/data-center/h200/
        on_paper("h200", gb=141, gb_s=4800, tflops_16=989, tflops_tf32=494, tflops_32=67, link_gb_s=64),
        # H100 SXM, https://www.nvidia.com/en-us/data-center/h100/
        on_paper("h100", gb=80, gb_s=3350, tflops_16=989, tflops_tf32=494, tflops_32=67, link_gb_s=64),
        # A100 SXM with 80 GB, https://www.nvidia.com/en-us/data-center/a100/
        on_paper("a100", gb=80, gb_s=2039, tflops_16=312, tflops_tf32=156, tflops_32=19.5, link_gb_s=32),
        # L4, https://www.nvidia.com/en-us/data-center/l4/
        on_paper("l4", gb=24, gb_s=300, tflops_16=121, tflops_tf32=60, tflops_32=30.3, link_gb_s=32),
    )
}
NAMES = (*DATASHEETS, "cpu")


def machine_of(name: str, results: Path | None) -> Machine:
    """Raises ConfigError where there is no such machine, or nothing was measured."""
    if name != "cpu" and results is not None:
        raise ConfigError(f"--results: is for --gpu cpu; {name} is planned by its datasheet")
    if name == "cpu":
        if results is None:
            raise ConfigError("--gpu cpu: needs --results, the folder with kernels-cpu.json and engine-cpu.json")
        return measured(results, free_memory(torch.device("cpu")))
    if name not in DATASHEETS:
        raise ConfigError(f"--gpu {name}: should be one of {', '.join(NAMES)}")
    return DATASHEETS[name]


def measured(results: Path, memory: float) -> Machine:
    """By the JSON that `benchmarks.engine.kernels` and `benchmarks.engine.throughput` wrote into `results`.

    A step of the measured model takes as long by the costs as it was measured to, and others accordingly.

    Raises:
        ConfigError: they are not there, or not what those write.
    """
    kernels, engine = (_read(results / name) for name in ("kernels-cpu.json", "engine-cpu.json"))
    try:
        return _fitted(kernels, engine, memory)
    except (KeyError, TypeError, ValueError, ZeroDivisionError, CheckpointError) as error:
        raise ConfigError(f"--results {results}: not what the benchmarks write: {error!r}") from None


def _fitted(kernels: Mapping[str, Any], engine: Mapping[str, Any], memory: float) -> Machine:
    rates, batches = kernels["machine_rates"], engine["batches"]
    each, fixed = linear_regression([row["batch"] for row in batches], [1e-3 * row["ms_per_step"] for row in batches])
    flops = 1e9 * rates["gemm_gflop_s"]
    machine = Machine(
        name="cpu",
        basis=f"rates and steps measured on {kernels['machine']['cpu']}, {kernels['date']}, "
        f"with up to {max(row['batch'] for row in batches)} streams of one model; what is beyond that is on paper",
        memory=memory,
        bandwidth=1e9 * rates["in_place_gb_s"],
        flops_16=flops,
        flops_32=flops,
        vector_flops=flops,
        host_link=None,
        step_seconds=max(0.0, fixed),
        bandwidth_share=1.0,
        compute_share=kernels["prefill"]["float32"]["useful_percent_of_gemm_rate"] / 100,
        skips_gates=True,
    )
    load = Load(
        active_fraction=kernels["densities"]["fired"],
        state_dtype=engine["state_dtype"],
        dtype=engine["dtype"],
        window=engine["attention_window"],
    )
    costs = costs_of(BDHConfig.from_dict(engine["model"]), load, machine.skips_gates)
    return replace(machine, bandwidth_share=_bandwidth_share(machine, costs, each))


def _bandwidth_share(machine: Machine, costs: Costs, seconds: float) -> float:
    """What is left of a sequence's share of a step, beside its products, goes to its state."""
    left = seconds - costs.product_flops / (machine.flops_32 * machine.compute_share)
    if left <= 0:
        raise ValueError("the products alone would take longer than the measured steps")
    return costs.state_traffic / machine.bandwidth / left


def _read(file: Path) -> Any:
    try:
        return parse_json(read_text(file, LARGEST_JSON))
    except (OSError, Malformed) as error:
        raise ConfigError(f"--results: {file} cannot be read: {error}") from None
