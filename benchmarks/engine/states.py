"""What it takes to save, restore and fork a state, beside a plain copy of a file of its size.

    python -m benchmarks.engine.states               # states of 24 MiB and of 201 MB, 9 rounds
    python -m benchmarks.engine.states --rounds 3

Variants take turns. `save` copies a slot and writes it to a file that is synced. `restore` reads and checks it with a
second thread, as the engine does while that writes nothing, and moves it to a slot. `fork` copies it from slot to slot.
`file copy` reads a file, writes another one and syncs it; `file read` only reads, both from memory where the system
still has the file there. `step` is what of a save or a restore an engine's step pays. Writes `states.json`:
milliseconds, and ratios to a copy of a file in the same round, and for `restore` to a reading of it.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine.loading import state_layout
from bdh_batch.engine.state_files import read_state, write_state
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.scheduler.prefixes import pack
from bdh_batch.system.threads import DaemonThreads
from benchmarks.common import figure, ratio, take_turns
from benchmarks.report import report_head, results_folder, write_report

CONFIGS = {  # the second is upstream's
    "24 MiB": BDHConfig(n_layer=6, n_embd=128, n_head=4, mlp_internal_dim_multiplier=64),
    "201 MB": BDHConfig(),
}
TOKENS = pack(range(4096))


def main() -> None:
    arguments = parse()
    head = report_head(["torch", "numpy"])
    report = {**head, "rounds": arguments.rounds, "states": {}}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        for name, config in CONFIGS.items():
            report["states"][name] = measured(name, config, Path(folder), arguments.rounds)
    write_report(arguments.out / "states.json", report)
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--folder", type=Path, help="on the disk that is measured; else the system's for temporary files"
    )
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


def measured(name: str, config: BDHConfig, folder: Path, rounds: int) -> dict[str, object]:
    """Figures for states of one size, by variant."""
    pool = StatePool(config, 3, torch.device("cpu"), transfer_slots=1)
    variants, size = variants_of(pool, folder), pool.states[0].nbytes
    with tqdm(total=rounds, desc=name, unit="round") as bar:
        times = take_turns(variants, rounds, tick=bar.update)
    figures: dict[str, object] = {
        variant: figure([1000 * each for each in seconds], "ms", "lower") for variant, seconds in times.items()
    }
    copied = [(variant, "file copy") for variant in ("save", "restore", "fork")]
    for variant, beside in (*copied, ("restore", "file read")):
        found = ratio(times[variant], times[beside])
        figures[f"{variant} / {beside}"] = {"value": found.value, "low": found.low, "high": found.high}
    return {"bytes": size, **figures}


def variants_of(pool: StatePool, folder: Path) -> dict[str, Callable[[], object]]:
    """Slot 0 holds a state; 1 and 2 are free, and 3 is on the way to files."""
    transfer, layout = len(pool.states), state_layout(pool, "a model", 0)
    pool.states[0].normal_()
    saved, plain, copied = folder / "state", folder / "plain", folder / "copied"
    helper = DaemonThreads(1, "helper")
    write_state(plain, layout, TOKENS, memory_of(pool, transfer, 0))

    def save() -> None:
        write_state(saved, layout, TOKENS, memory_of(pool, transfer, 0))

    def restore() -> None:
        read_state(plain, layout, TOKENS, pool.memory(transfer), helper=helper)
        pool.copy(transfer, 1, moves=True)

    def copy_file() -> None:
        shutil.copyfile(plain, copied)
        with copied.open("rb") as file:
            os.fsync(file.fileno())

    def read_file() -> None:
        with plain.open("rb", buffering=0) as file:
            file.readinto(pool.memory(transfer))

    return {
        "save": save,
        "restore": restore,
        "fork": lambda: pool.copy(0, 2),
        "step": lambda: pool.copy(0, transfer),
        "file copy": copy_file,
        "file read": read_file,
    }


def memory_of(pool: StatePool, transfer: int, slot: int) -> memoryview:
    """Copies a state to the transfer slot, and returns its bytes there."""
    pool.copy(slot, transfer)
    return pool.memory(transfer)


if __name__ == "__main__":
    main()
