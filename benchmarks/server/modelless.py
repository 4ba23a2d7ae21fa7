"""The real server without a model's work: all there is from socket to scheduler, on a runner that computes nothing.

    python -m benchmarks.server.modelless --port 8000 --ahead 8

Its completions are one line of English, over and over, whatever was asked: a token is a character of it.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import sys
import threading
import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from pathlib import Path

import torch
import uvloop

from bdh_batch import settings
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.loading import LoadedEngine
from bdh_batch.messages import Outcome, Plan, TokenLogprob
from bdh_batch.processes.model_settings import bundled_model
from bdh_batch.server import run

TEXT = b'He said: "The quick brown fox jumps over the lazy dog." And it did, too. '
SLOW_SECONDS = 0.02
PREFILL_TOKENS = 2**16  # of a step: all prompts begin at once


class ModellessRunner:
    """Draws the next character of TEXT for every sequence, as fast as the event loop takes them.

    Args:
        crowd: sequences in a step that is fast; before so many have come, steps are slow, so that all begin together.
        ahead: steps that may be made before the event loop has come to those before them.
        pace: seconds from one step to the next, at least.
    """

    def __init__(self, crowd: int, ahead: int, pace: float = 0.0) -> None:
        self._crowd = crowd
        self._pace = pace
        self._due = 0.0  # the next step
        self._room = threading.Semaphore(ahead)
        self._loop: asyncio.AbstractEventLoop | None = None

    def follow(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop

    def run(self, plan: Plan) -> Outcome:
        if self._loop is not None:
            self._room.acquire()
            self._loop.call_soon_threadsafe(self._make_room, self._loop)
        if len(plan.segments) < self._crowd:
            time.sleep(SLOW_SECONDS)
        if self._pace:
            self._due = max(self._due, time.monotonic()) + self._pace
            time.sleep(self._due - time.monotonic())
        drawing = [(row, each) for row, each in enumerate(plan.segments) if each.sampling is not None]
        drawn: list[int | None] = [None] * len(plan.segments)
        logprobs = {}
        for row, segment in drawing:
            position = (segment.start + len(segment.tokens)) % len(TEXT)
            drawn[row] = TEXT[position]
            if segment.sampling is not None and segment.sampling.logprobs is not None:
                logprobs[row] = token_logprob(position, segment.sampling.logprobs)
        return Outcome(drawn, logprobs)

    def _make_room(self, loop: asyncio.AbstractEventLoop) -> None:
        """What was published has come to mailboxes. It is written in the loop's next turn; after that there is room."""
        loop.call_soon(self._room.release)


@cache
def token_logprob(position: int, top: int) -> TokenLogprob:
    """The logprob of the token at a position: real ones have as many digits."""
    others = [(ord("a") + rank, math.log(0.5 ** (rank + 2))) for rank in range(1, top)]
    return TokenLogprob(TEXT[position], math.log(0.7), [(TEXT[position], math.log(0.7)), *others][:top])


def load_modelless(runner: ModellessRunner) -> Callable[[settings.Settings, Path], LoadedEngine]:
    """A way to load an engine that computes nothing; the bundled model lends its sizes."""

    def load(chosen: settings.Settings, path: Path) -> LoadedEngine:
        model = load_model(path, torch.float32, torch.device("cpu"))
        return LoadedEngine(model, runner, slots=chosen.scheduler.max_running, host_slots=0)

    return load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--crowd", type=int, default=256, help="streams at the same time")
    parser.add_argument("--ahead", type=int, default=8, help="steps made before the event loop took those before them")
    parser.add_argument(
        "--pace", type=float, default=0.0, metavar="SECONDS", help="from one step to the next, at least"
    )
    parser.add_argument("--workers", type=int, default=1, help="front ends")
    parser.add_argument("--replicas", type=int, help="engine processes; else it is in the server's process")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    parser.add_argument("--process", help=argparse.SUPPRESS)
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    chosen = parser.parse_args(given)
    overrides = [
        ("server.port", str(chosen.port)),
        ("model.path", str(bundled_model())),
        ("scheduler.max_running", str(chosen.crowd)),
        ("scheduler.prefill_tokens", str(PREFILL_TOKENS)),
        ("scheduler.target_step_ms", "0"),  # time between steps is the event loop's, not the device's
    ]
    overrides += [(option, value) for option, _, value in (text.partition("=") for text in chosen.set)]
    if chosen.replicas is not None:
        overrides += [("server.workers", str(chosen.workers)), ("engine.replicas", str(chosen.replicas))]
    runner = ModellessRunner(chosen.crowd, chosen.ahead, chosen.pace)
    resolved = settings.load(None, overrides)
    program = ("benchmarks.server.modelless",)
    ready = partial(follow, runner)
    uvloop.run(run(resolved.settings, given, chosen.process, ready, load_modelless(runner), program))


def follow(runner: ModellessRunner, *_: str) -> None:
    runner.follow(asyncio.get_running_loop())


if __name__ == "__main__":
    main()
