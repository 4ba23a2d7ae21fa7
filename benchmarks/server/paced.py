"""The real server on a runner that computes nothing, and makes so many steps a second: for what clients make of tokens.

    python -m benchmarks.server.paced --port 8000 --rate 1000

Its completions are the line of `modelless.py`; its neurons are those of a model of the bundled one's sizes, at random.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import uvloop

from bdh_batch import settings
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.loading import LoadedEngine, attention_window, state_layout
from bdh_batch.engine.state_io import StateIO
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.messages import Neurons, Outcome, Plan, Segment, TokenLogprob
from bdh_batch.processes.model_settings import bundled_model
from bdh_batch.server import run
from benchmarks.server.modelless import TEXT, token_logprob

SHAPES = 256  # different sets of neurons
MOST_WATCHED = 128  # neurons of a layer that a request may ask for


class PacedRunner:
    """Draws the next character of TEXT for every sequence, `rate` times a second.

    Args:
        sizes: layers, heads, and neurons of a head.
    """

    def __init__(self, rate: float, sizes: tuple[int, int, int]) -> None:
        self._seconds = 1 / rate
        self._next = 0.0
        layers, heads, self._per_head = sizes
        chance = np.random.default_rng(0)
        self._active = chance.uniform(0.1, 0.3, (SHAPES, layers)).astype("<f4")
        drawn = [chance.permuted(np.arange(heads * self._per_head)) for _ in range(SHAPES * layers)]
        self._strongest = np.stack([each[:MOST_WATCHED] for each in drawn]).reshape(SHAPES, layers, -1).astype("<u4")
        self._values = -np.sort(-chance.exponential(1, self._strongest.shape), axis=2).astype("<f4")

    def run(self, plan: Plan) -> Outcome:
        self._next = max(self._next + self._seconds, time.perf_counter() - self._seconds)
        time.sleep(max(0.0, self._next - time.perf_counter()))
        drawn: list[int | None] = [None] * len(plan.segments)
        logprobs, targets, neurons = {}, {}, {}
        for row, segment in enumerate(plan.segments):
            if segment.sampling is not None:
                position = segment.start + len(segment.tokens)
                drawn[row] = TEXT[position % len(TEXT)]
                if segment.sampling.logprobs is not None:
                    logprobs[row] = token_logprob(position % len(TEXT), segment.sampling.logprobs)
            if segment.targets:
                targets[row] = [_target(token, segment.top) for token in segment.targets]
            if segment.watch:
                neurons[row] = self._neurons(segment)
        return Outcome(drawn, logprobs, targets, neurons=neurons)

    def _neurons(self, segment: Segment) -> list[Neurons]:
        found = []
        for at, token in enumerate(segment.tokens[segment.watch_from :], segment.start + segment.watch_from):
            row, top = at % SHAPES, segment.watch
            strongest, values = self._strongest[row, :, :top].tobytes(), self._values[row, :, :top].tobytes()
            found.append(Neurons(token, self._per_head, self._active[row].tobytes(), strongest, values))
        return found


def _target(token: int, top: int) -> TokenLogprob:
    return TokenLogprob(token, -1.0, [(ord("a") + rank, -1.0 - rank) for rank in range(top)])


def load_paced(rate: float) -> Callable[[settings.Settings, Path], LoadedEngine]:
    """A way to load an engine that computes nothing; the bundled model lends its sizes."""

    def load(chosen: settings.Settings, path: Path) -> LoadedEngine:
        cpu = torch.device("cpu")
        model = load_model(path, torch.float32, cpu)
        config = model.config
        runner = PacedRunner(rate, (config.n_layer, config.n_head, config.neurons_per_head))
        window = attention_window(chosen.model.attention_window, config)
        pool = StatePool(config, 1, cpu, window)
        states = StateIO(pool, state_layout(pool, "paced", window))
        return LoadedEngine(model, runner, slots=chosen.scheduler.max_running, host_slots=0, states=states)

    return load


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--rate", type=float, default=1000, help="steps a second")
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    given = [*(sys.argv[1:] if arguments is None else arguments)]
    chosen = parser.parse_args(given)
    overrides = [
        ("server.port", str(chosen.port)),
        ("model.path", str(bundled_model())),
        ("scheduler.target_step_ms", "0"),  # time between steps is the pace's, not the device's
    ]
    overrides += [(option, value) for option, _, value in (text.partition("=") for text in chosen.set)]
    resolved = settings.load(None, overrides)
    uvloop.run(run(resolved.settings, given, None, lambda *_: None, load_paced(chosen.rate)))


if __name__ == "__main__":
    main()
