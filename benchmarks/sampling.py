"""What a step pays to choose its tokens, by what its requests wish.

    python -m benchmarks.sampling                       # 256 rows, vocabularies of 256 and 8,192
    python -m benchmarks.sampling --before old.py       # also the `sample` of another sampling.py, by path

Sides take turns. Each chooses a token for every row: `plain` ones have a temperature alone; a row with wishes is
penalised on the tokens of a prompt and an answer, or told with the log-probabilities of 5. Figures are milliseconds a
step, the median, of the one thread's own time: what else the machine does adds little to them.
"""

from __future__ import annotations

import argparse
import importlib.util
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdh_batch.messages import Adjustment, SamplingParams
from bdh_batch.model.runner import choose
from benchmarks.common import alternate, report_head, write_json

VOCABULARIES = (256, 8192)
PLAIN = SamplingParams(temperature=0.8, seed=1)
PENALISED = SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1)
BIASED = SamplingParams(temperature=0.8, seed=1, logit_bias=((5, 1.5), (9, -100.0)))
TOLD = SamplingParams(temperature=0.8, seed=1, logprobs=5)
KINDS = {"penalised": PENALISED, "biased": BIASED, "with logprobs": TOLD}


def side(logits: Tensor, wishing: int, params: SamplingParams, known: int) -> Callable[[], object]:
    """A step in which the first `wishing` rows have `params`, the others none."""
    rows, vocabulary = logits.shape
    chance = random.Random(0)
    each = [params if row < wishing else PLAIN for row in range(rows)]
    wishes = []
    for row in range(wishing):
        wish = Adjustment.of(params, [chance.randrange(vocabulary) for _ in range(known)], (), 0)
        if wish is not None:
            for _ in range(known):
                wish.count(chance.randrange(vocabulary))
            wishes.append((row, wish))
    return lambda: choose(logits, each, range(rows), wishes)


def before(file: Path, logits: Tensor) -> Callable[[], object]:
    spec = importlib.util.spec_from_file_location("sampling_before", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return partial(module.sample, logits, [PLAIN] * len(logits), range(len(logits)))


def thread_time(side: Callable[[], object]) -> float:
    start = time.thread_time()
    side()
    return time.thread_time() - start


def measure(rows: int, vocabulary: int, known: int, repeats: int, old: Path | None) -> dict[str, float]:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    sides = {"plain": side(logits, 0, PLAIN, known)} | ({} if old is None else {"before": before(old, logits)})
    for name, params in KINDS.items():
        for wishing in (1, rows):
            sides[f"{wishing} {name}"] = side(logits.clone(), wishing, params, known)  # it changes what it is given
    with torch.inference_mode():
        return {name: round(1000 * seconds, 3) for name, seconds in alternate(sides, repeats, thread_time).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--known", type=int, default=500, help="tokens of a prompt, and as many of an answer")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--before", type=Path, help="another sampling.py, whose `sample` is measured beside")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/sampling.json"))
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for vocabulary in VOCABULARIES:
        found[str(vocabulary)] = measure(chosen.rows, vocabulary, chosen.known, chosen.repeats, chosen.before)
        print(vocabulary, found[str(vocabulary)])
    report = report_head(["torch"]) | {
        "rows": chosen.rows,
        "known_tokens": 2 * chosen.known,
        "milliseconds_by_vocabulary": found,
    }
    write_json(chosen.out, report)


if __name__ == "__main__":
    main()
