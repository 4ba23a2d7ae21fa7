"""What it takes to count the requests of very many addresses: memory, and time for each, in the event loop.

    python -m benchmarks.stress.rates  # 1,000,000 addresses in a minute
    python -m benchmarks.stress.rates --addresses 100000 --out /tmp

Variants: `ledger` is the server's, `limits` is the `limits` library's MemoryStorage with a moving window, as the server
used it before. Each has a process of its own; each address asks once, within a minute by the clock of the ledger, and
those that came first ask again. Writes `rates.json`.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.report import report_head, results_folder, write_report

LIMIT = 600
AGAIN = 1000  # addresses that ask again, once all have asked
MINUTE = 60.0


def ledger(addresses: int) -> tuple[Callable[[str], object], Callable[[], int]]:
    """How one asks, and how many are known."""
    from bdh_batch.http.auth.ledger import MemoryLedger

    asked = 0

    def clock() -> float:
        return MINUTE * asked / addresses

    known = MemoryLedger(clock)

    def ask(name: str) -> None:
        nonlocal asked
        asked += 1
        assert known.take(name, 1, LIMIT, own_log=False).granted

    return ask, lambda: len(known)


def limits(addresses: int) -> tuple[Callable[[str], object], Callable[[], int]]:
    from limits import RateLimitItemPerMinute
    from limits.storage import MemoryStorage
    from limits.strategies import MovingWindowRateLimiter

    storage, item = MemoryStorage(), RateLimitItemPerMinute(LIMIT)

    def ask(name: str) -> None:
        limiter = MovingWindowRateLimiter(storage)
        assert limiter.hit(item, name)
        limiter.get_window_stats(item, name)

    return ask, lambda: len(storage.events)


VARIANTS = {"ledger": ledger, "limits": limits}


def measure(variant: str, addresses: int, results: Any) -> None:
    ask, known = VARIANTS[variant](addresses)
    seconds = array("d", bytes(8 * addresses))
    gc.collect()
    gc.freeze()
    before = psutil.Process().memory_info().rss
    processor = time.process_time()
    for number in range(addresses):
        seconds[number] = clocked(ask, f"requests/@{number:016x}")
    processor = time.process_time() - processor  # of all threads: `limits` has one that looks for what has expired
    mebibytes = round((psutil.Process().memory_info().rss - before) / 2**20, 1)
    again = array("d", [clocked(ask, f"requests/@{number:016x}") for number in range(AGAIN)])
    results.put(
        {
            "mebibytes": mebibytes,
            "known": known(),
            "seconds": round(sum(seconds), 1),
            "processor_microseconds_a_request": round(1e6 * processor / addresses, 2),
            "microseconds": figures(seconds),
            "microseconds_of_the_last": figures(seconds[-AGAIN:]),
            "microseconds_again": figures(again),
        }
    )


def clocked(ask: Callable[[str], object], name: str) -> float:
    began = time.perf_counter()
    ask(name)
    return time.perf_counter() - began


def figures(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(1e6 * each for each in seconds)
    return {
        "median": round(statistics.median(ordered), 2),
        "p99": round(ordered[int(0.99 * len(ordered))], 2),
        "max": round(ordered[-1], 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--addresses", type=int, default=1_000_000)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args()
    if chosen.addresses < AGAIN:
        parser.error(f"--addresses should be at least {AGAIN}")
    head = report_head(["limits"])
    processes = multiprocessing.get_context("spawn")
    variants = {}
    for variant in VARIANTS:
        results: Any = processes.Queue()
        process = processes.Process(target=measure, args=(variant, chosen.addresses, results))
        process.start()
        variants[variant] = results.get()
        process.join()
        print(variant, json.dumps(variants[variant]), file=sys.stderr)
    report = {**head, "addresses": chosen.addresses, "limit": LIMIT, "sides": variants}
    write_report(chosen.out / "rates.json", report)


if __name__ == "__main__":
    main()
