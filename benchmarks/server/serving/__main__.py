"""Runs the scenarios; `python -m benchmarks.server.serving --help`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import uvloop

from benchmarks.report import load_json, report_head, results_folder, write_report
from benchmarks.server import serving
from benchmarks.server.serving.batching import batching
from benchmarks.server.serving.drawing import draw
from benchmarks.server.serving.long_prompt import prompt
from benchmarks.server.serving.shared_prefix import shared_prefix
from benchmarks.server.serving.tenants import keys

SCENARIOS = {"prompt": prompt, "keys": keys, "beginning": shared_prefix, "batching": batching}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=serving.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="python -m benchmarks.server.serving",
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--targets", nargs="+", type=float, default=[100, 36, 24], help="scheduler.target_step_ms")
    parser.add_argument(
        "--fresh", nargs="*", type=float, default=[36], help="the same, of servers that did nothing yet"
    )
    parser.add_argument("--streams", type=int, default=32, help="that decode beside the long prompt")
    parser.add_argument("--long", type=int, default=16384, help="tokens of the long prompt")
    parser.add_argument("--rounds", type=int, default=4, help="without and with the long prompt")
    parser.add_argument("--running", nargs="+", type=int, default=[64, 1024], help="scheduler.max_running")
    parser.add_argument("--flood", type=int, default=500, help="requests of a tenant that floods")
    parser.add_argument("--singles", type=int, default=20, help="requests, one at a time, of the other")
    parser.add_argument("--single-tokens", type=int, default=256, help="of their prompts")
    parser.add_argument("--still", type=int, default=50, help="open requests that still are a flood")
    parser.add_argument("--rounds-of-keys", type=int, default=2, help="alone, and beside a flood")
    parser.add_argument(
        "--set", nargs="*", default=[], metavar="OPTION=VALUE", help="of servers, beside the scenario's own"
    )
    parser.add_argument(
        "--against", type=Path, help="an older checkout, whose server alternates with this one's in `keys`"
    )
    parser.add_argument("--chats", type=int, default=100, help="with a system prompt in common")
    parser.add_argument("--system", type=int, default=2048, help="tokens of the system prompt")
    parser.add_argument("--together", type=int, default=16, help="chats sent at once")
    parser.add_argument("--jobs", type=int, default=256, help="completions with a heavy tail")
    parser.add_argument("--median", type=float, default=48.0, help="tokens of such a completion")
    parser.add_argument("--spread", type=float, default=1.0, help="of the logarithm of its length")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rounds-of-batching", type=int, default=3)
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    chosen = parse(argv)
    file = chosen.out / "serving.json"
    for name in chosen.only:
        head = report_head(["torch", "numba", "uvicorn", "uvloop"])
        figures = uvloop.run(SCENARIOS[name](chosen))
        write_report(file, {**load_json(file), name: {**head, **figures}})
    draw(chosen.out, load_json(file))


if __name__ == "__main__":
    main()
