"""Compiles the Triton kernels for chips that need not be there, and reads from what was compiled what a program takes.

A program by itself: Triton decides when it is imported whether it compiles or interprets, and tests interpret.

    python -m benchmarks.engine.gpu_compile     # prints JSON: for each case and chip its resources, or the error
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from tempfile import NamedTemporaryFile
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
WEIGHTS = ("embed", "encoder", "gates", "decoder", "lm_head", "fired", "normed")  # of the weights' dtype
MATRICES = ("encoder", "gates", "decoder")  # of one layer, which need not begin at a multiple of 16 bytes
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
# Of a multiprocessor, by the CUDA programming guide, for both chips but where they differ: registers are handed out in
# eights to the 32 threads of a warp, and 1 KiB of shared memory goes to the system for each program.
REGISTERS, WARPS, PROGRAMS, SYSTEM = 65536, 64, 32, 1024
SHARED = {80: 164 << 10, 90: 228 << 10}


class Case(NamedTuple):
    name: str
    kernel: str
    shape: Shape
    blocks: Blocks
    states: str
    variant: str
    aligned: bool  # whether MATRICES do
    default: bool  # what is launched where nothing was tuned


@dataclass(frozen=True)
class Resources:
    """What one program of a compiled kernel takes, and how its loads overlap with what it computes."""

    shared: int  # bytes
    registers: int  # of a thread
    stack: int  # bytes of a thread: what registers do not hold is spilled there
    warps: int
    programs: int  # that one multiprocessor holds side by side
    copies: int  # instructions that load to shared memory without waiting
    in_flight: int  # groups of them that are still under way where the main loop waits for the oldest


def cases() -> Iterator[Case]:
    """The defaults for some shapes and all dtypes, and all that the search for the best block sizes would try."""
    kernels = list(constants(UPSTREAM, Blocks()))
    for label, shape, dtypes in (
        ("upstream", UPSTREAM, list(TYPES)),
        ("bundled", BUNDLED, [torch.float32, torch.bfloat16]),
        ("odd", ODD, [torch.float32]),
        ("wide", WIDE, [torch.float32, torch.bfloat16]),
    ):
        for dtype, kernel in product(dtypes, kernels):
            for variant in VARIANTS.get(kernel, [""]):
                name = f"{label}-{kernel}-{TYPES[dtype]}{variant}"
                yield case(name, kernel, replace(shape, dtype=dtype), Blocks(), variant=variant)
    for kernel in ("attend_token_kernel", "attend_chunk_kernel"):
        for (label, shape), variant in product(
            {"upstream": UPSTREAM, "bundled": BUNDLED}.items(), VARIANTS.get(kernel, [""])
        ):
            name = f"{label}-{kernel}-bf16-states{variant}"
            yield case(name, kernel, shape, Blocks(), "bf16", variant)
    for kernel in ("encode_kernel", "contract_kernel"):
        yield case(f"odd-{kernel}-fp32-unaligned", kernel, replace(ODD, dtype=torch.float32), Blocks(), aligned=False)
    for tuned in CANDIDATES:
        for number, blocks in enumerate(candidates(Blocks(), tuned)):
            # What is tuned with one kernel may matter to others.
            for kernel in (name for name in kernels if matters(tuned, name, blocks)):
                for dtype, variant in product((torch.float32, torch.bfloat16), VARIANTS.get(kernel, [""])):
                    name = f"{tuned}-{number}-{kernel}-{TYPES[dtype]}{variant}"
                    shape = replace(UPSTREAM, dtype=dtype)
                    yield case(name, kernel, shape, blocks, variant=variant)._replace(default=False)


def case(
    name: str, kernel: str, shape: Shape, blocks: Blocks, states: str = "fp32", variant: str = "", aligned: bool = True
) -> Case:
    fitted = blocks.fitted(shape.width, shape.neurons, shape.dtype.itemsize)
    return Case(name, kernel, shape, fitted, states, variant, aligned, default=True)


def matters(tuned: str, kernel: str, blocks: Blocks) -> bool:
    """Whether a candidate changes what a kernel is compiled for, and its sizes, not only how many parts it adds up."""
    changed = constants(UPSTREAM, blocks)[kernel] != constants(UPSTREAM, Blocks())[kernel]
    return changed and kernel not in ("normalise_kernel", "finish_kernel")


def compiled(case: Case) -> dict[str, dict[str, int] | str]:
    """What a program takes, for each chip."""
    return {f"sm_{chip}": attempt(case, chip) for chip in CHIPS}


def attempt(case: Case, chip: int) -> dict[str, int] | str:
    try:
        return asdict(resources(case, chip))
    except Exception as error:  # noqa: BLE001  whatever the compiler raises is what the test shows
        return f"{type(error).__name__}: {error}"


def resources(case: Case, chip: int) -> Resources:
    kernel = compile_for(case, chip)
    shared, warps = int(kernel.metadata.shared), int(kernel.metadata.num_warps)
    registers, stack = usage(kernel.asm["cubin"])
    ptx = kernel.asm["ptx"]
    waits = [int(groups) for groups in re.findall(r"cp\.async\.wait_group\s+(\d+)", ptx)]
    return Resources(
        shared=shared,
        registers=registers,
        stack=stack,
        warps=warps,
        programs=programs_of(registers, shared, warps, chip),
        copies=len(re.findall(r"cp\.async\.c[ag]\.", ptx)),
        in_flight=max(waits, default=0),
    )


def compile_for(case: Case, chip: int) -> Any:
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
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def type_of(argument: str, case: Case) -> str:
    if argument in INTEGERS:
        return INTEGERS[argument]
    if argument == "states":
        return f"*{case.states}"
    return f"*{TYPES[case.shape.dtype]}" if argument in WEIGHTS else "*fp32"


def usage(cubin: bytes) -> tuple[int, int]:
    """Registers, and bytes of stack, of a thread, by the reader of binaries that Triton brings along.

    Raises:
        ValueError: it did not say so.
    """
    reader = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([reader, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise ValueError(f"{reader.name} does not say what a kernel uses: {done.stdout!r}")
    return int(found[1]), int(found[2])


def programs_of(registers: int, shared: int, warps: int, chip: int) -> int:
    """How many programs a multiprocessor holds side by side."""
    of_registers = REGISTERS // (-(-registers // 8) * 8 * 32 * warps)
    return min(of_registers, SHARED[chip] // (shared + SYSTEM), WARPS // warps, PROGRAMS)


def results_of(chosen: list[Case]) -> dict[str, dict[str, dict[str, int] | str]]:
    """What programs of these take, by the case's name and the chip. Compiles in two processes."""
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        return dict(zip([case.name for case in chosen], pool.map(compiled, chosen, chunksize=4)))


def main() -> None:
    os.nice(10)  # tests run beside it
    print(json.dumps(results_of(list(cases()))))


if __name__ == "__main__":
    main()
