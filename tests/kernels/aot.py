"""Compiles the Triton kernels for chips that need not be there, a program by itself: Triton decides when it is imported
whether it compiles or interprets, and the other tests interpret.

    python -m tests.kernels.aot     # prints JSON: for each case and chip the bytes of shared memory, or the error
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from itertools import product
from multiprocessing import get_context
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bdh_batch.kernels import triton_ops
from bdh_batch.kernels.cuda import Shape, constants
from bdh_batch.kernels.select import TRITON_WIDEST
from bdh_batch.kernels.tuning import CANDIDATES, Blocks, candidates

CHIPS = (80, 90)
TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
WEIGHTS = ("embed", "encoder", "encoder_v", "decoder", "lm_head", "fired", "normed")  # of the weights' dtype
MATRICES = ("encoder", "encoder_v", "decoder")  # of one layer, which need not begin at a multiple of 16 bytes
INTEGERS = {
    "tokens": "*i64", "positions": "*i64", "singles": "*i64", "slots": "*i64", "segments": "*i64",
    "pairs": "*i16", "counts": "*i32", "T": "i32", "layer": "i32",
}  # fmt: skip
UPSTREAM = Shape(layers=6, heads=4, width=256, neurons=8192, vocabulary=256, half_window=0, dtype=torch.bfloat16)
# What a model or a step asks of a kernel, by what its cases are called: constants, or arguments that are not given.
VARIANTS: dict[str, dict[str, dict[str, bool | None]]] = {
    "embed_kernel": {"": {"vectors": None}, "-latent": {}},
    "attend_token_kernel": {"": {"LATENT": False}, "-latent": {"LATENT": True}},
    "finish_kernel": {"": {"NORM": True}, "-final-norm": {"NORM": False}},
}
BUNDLED = replace(UPSTREAM, width=128, neurons=1024, half_window=64)
ODD = replace(UPSTREAM, heads=3, width=48, neurons=162, vocabulary=97, half_window=5)
WIDE = replace(UPSTREAM, width=TRITON_WIDEST, neurons=16384)


class Case(NamedTuple):
    name: str
    kernel: str
    shape: Shape
    blocks: Blocks
    states: str
    variant: str
    aligned: bool  # whether MATRICES do


def cases() -> Iterator[Case]:
    """The defaults for some shapes and all dtypes, and all that the search for the best block sizes would try."""
    kernels = list(constants(UPSTREAM, Blocks()))
    for label, shape, dtype in (
        *(("upstream", UPSTREAM, dtype) for dtype in TYPES),
        ("bundled", BUNDLED, torch.bfloat16),
        ("odd", ODD, torch.float32),
        ("wide", WIDE, torch.float32),
    ):
        for kernel in kernels:
            for variant in VARIANTS.get(kernel, [""]):
                name = f"{label}-{kernel}-{TYPES[dtype]}{variant}"
                yield case(name, kernel, replace(shape, dtype=dtype), Blocks(), variant=variant)
    for kernel in ("attend_token_kernel", "attend_chunk_kernel"):
        for variant in VARIANTS.get(kernel, [""]):
            name = f"bundled-{kernel}-bf16-states{variant}"
            yield case(name, kernel, BUNDLED, Blocks(), "bf16", variant)
    for kernel in ("encode_kernel", "contract_kernel"):
        yield case(f"odd-{kernel}-fp32-unaligned", kernel, replace(ODD, dtype=torch.float32), Blocks(), aligned=False)
    for tuned in CANDIDATES:
        for number, blocks in enumerate(candidates(Blocks(), tuned)):
            # What is tuned with one kernel may matter to others.
            for kernel in (name for name in kernels if matters(tuned, name, blocks)):
                for dtype, variant in product((torch.float32, torch.bfloat16), VARIANTS.get(kernel, [""])):
                    name = f"{tuned}-{number}-{kernel}-{TYPES[dtype]}{variant}"
                    yield case(name, kernel, replace(UPSTREAM, dtype=dtype), blocks, variant=variant)


def case(
    name: str, kernel: str, shape: Shape, blocks: Blocks, states: str = "fp32", variant: str = "", aligned: bool = True
) -> Case:
    fitted = blocks.fitted(shape.width, shape.neurons, shape.dtype.itemsize)
    return Case(name, kernel, shape, fitted, states, variant, aligned)


def matters(tuned: str, kernel: str, blocks: Blocks) -> bool:
    """Whether a candidate changes what a kernel is compiled for, and its sizes, not only how many parts it adds up."""
    changed = constants(UPSTREAM, blocks)[kernel] != constants(UPSTREAM, Blocks())[kernel]
    return changed and kernel not in ("normalise_kernel", "finish_kernel")


def compiled(case: Case) -> dict[str, int | str]:
    """Bytes of shared memory that a program takes, for each chip."""
    return {f"sm_{chip}": attempt(case, chip) for chip in CHIPS}


def attempt(case: Case, chip: int) -> int | str:
    try:
        return shared_memory(case, chip)
    except Exception as error:  # noqa: BLE001  whatever the compiler raises is what the test shows
        return f"{type(error).__name__}: {error}"


def shared_memory(case: Case, chip: int) -> int:
    kernel: Any = getattr(triton_ops, case.kernel)
    fixed = constants(case.shape, case.blocks)[case.kernel] | VARIANTS.get(case.kernel, {}).get(case.variant, {})
    options = {name: fixed.pop(name) for name in ("num_warps", "num_stages") if name in fixed}
    signature = {name: "constexpr" if name in fixed else type_of(name, case) for name in kernel.arg_names}
    # Tensors begin at multiples of 16 bytes, which Triton sees at run time; it does not look at some.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, each in enumerate(kernel.params)
        if signature[each.name].startswith("*")
        and not each.do_not_specialize_on_alignment
        and (case.aligned or each.name not in MATRICES)
    }
    source = ASTSource(kernel, signature, fixed, aligned)
    return int(triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options).metadata.shared)


def type_of(argument: str, case: Case) -> str:
    if argument in INTEGERS:
        return INTEGERS[argument]
    if argument == "states":
        return f"*{case.states}"
    return f"*{TYPES[case.shape.dtype]}" if argument in WEIGHTS else "*fp32"


def main() -> None:
    os.nice(10)  # tests run beside it
    everything = list(cases())
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        results = pool.map(compiled, everything, chunksize=4)
        json.dump({case.name: result for case, result in zip(everything, results)}, sys.stdout)


if __name__ == "__main__":
    main()
