"""What a step pays to choose its tokens, by the sampling parameters of its requests.

    python -m benchmarks.engine.sampling           # 256 rows, vocabularies of 256 and 8,192
    python -m benchmarks.engine.sampling --rows 1  # a single stream

Variants take turns. Each chooses a token for every row: `plain` ones have a temperature alone, `filtered` ones a top_k,
a top_p and a min_p beside it, and both are also drawn by torch's operators, as on a device: `plain, in torch`. Other
rows are penalised on the tokens of a prompt and a completion, biased, or with the log-probabilities of 5. Figures are
milliseconds a step, the median, of the one thread's own time: what else the machine does adds little to them.

`worst` is what requests may ask for at most: 64 rows, each with a bias for every token, a prompt and a completion that
had every token, a ban on all but one, 20 log-probabilities; and a stream with 16 stop strings of 1 KiB that overlap
with a completion of one letter, in microseconds a token."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bdh_batch.engine.sampling.choosing import Chooser
from bdh_batch.engine.sampling.draw import sample
from bdh_batch.engine.sampling.logits_processors import process_logits
from bdh_batch.messages import NO_TOKENS, LogitBias, LogitsProcessors, SamplingParams, distinct
from bdh_batch.text.stop_strings import StopStrings
from bdh_batch.text.stream import TextStream
from bdh_batch.text.tokenizer import ByteTokenizer
from benchmarks.common import alternate
from benchmarks.report import report_head, results_folder, write_report

VOCABULARIES = (256, 8192)
PLAIN = SamplingParams(temperature=0.8, seed=1)
FILTERED = SamplingParams(temperature=0.8, seed=1, top_k=40, top_p=0.95, min_p=0.02)
PENALISED = SamplingParams(temperature=0.8, seed=1, repetition_penalty=1.1, frequency_penalty=0.2, presence_penalty=0.1)
BIASED = SamplingParams(temperature=0.8, seed=1, logit_bias=LogitBias.of({5: 1.5, 9: -100.0}))
WITH_LOGPROBS = SamplingParams(temperature=0.8, seed=1, logprobs=5)
KINDS = {"penalised": PENALISED, "biased": BIASED, "with logprobs": WITH_LOGPROBS}
CHOOSER = Chooser(torch.device("cpu"))
WORST_ROWS, WORST_VOCABULARIES = 64, (256, 50_257)


def variant(logits: Tensor, processed: int, params: SamplingParams, known: int) -> Callable[[], object]:
    """A step in which the first `processed` rows have `params`, the others none."""
    rows, vocabulary = logits.shape
    chance = random.Random(0)
    each = [params if row < processed else PLAIN for row in range(rows)]
    processors = []
    for row in range(processed):
        processor = LogitsProcessors.of(params, [chance.randrange(vocabulary) for _ in range(known)], NO_TOKENS, 0)
        if processor is not None:
            for _ in range(known):
                processor.count(chance.randrange(vocabulary))
            processors.append((row, processor))
    return lambda: CHOOSER.choose(logits, each, range(rows), processors)


def thread_time(variant: Callable[[], object]) -> float:
    start = time.thread_time()
    variant()
    return time.thread_time() - start


def measure(rows: int, vocabulary: int, known: int, repeats: int) -> dict[str, float]:
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    variants: dict[str, Callable[[], object]] = {}
    for name, params in {"plain": PLAIN, "filtered": FILTERED}.items():
        variants[name] = variant(logits, rows, params, known)
        variants[f"{name}, in torch"] = partial(sample, logits, [params] * rows, range(rows))
    for name, params in KINDS.items():
        for processed in sorted({1, rows}):
            variants[f"{processed} {name}"] = variant(
                logits.clone(), processed, params, known
            )  # it changes what it is given
    with torch.inference_mode():
        return {name: round(1000 * seconds, 3) for name, seconds in alternate(variants, repeats, thread_time).items()}


def worst(rows: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Milliseconds a step, of which `adjusting` is the logits processors, and microseconds a token of a stream."""
    logits = torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(0)) * 3
    every = range(vocabulary)
    bias = LogitBias.of({token: token % 7 - 3.0 for token in every})
    params = replace(PENALISED, repetition_penalty=1.1, logit_bias=bias, logprobs=20)
    first = LogitsProcessors.of(params, every, distinct(every[1:]), early=vocabulary + 1)
    assert first is not None
    processors = [(row, first.afresh()) for row in range(rows)]
    for _, processor in processors:
        for token in every:
            processor.count(token)
    variants: dict[str, Callable[[], object]] = {
        "plain": partial(CHOOSER.choose, logits, [PLAIN] * rows, range(rows), []),
        "adjusting": partial(process_logits, logits, processors),
        "all": partial(CHOOSER.choose, logits, [params] * rows, range(rows), processors),
        "stop strings, us a token": partial(stream, 1000),
    }
    with torch.inference_mode():
        return {name: round(1000 * seconds, 3) for name, seconds in alternate(variants, repeats, thread_time).items()}


STOPS = StopStrings(["a" * length + "b" for length in range(1008, 1024)])


def stream(tokens: int) -> None:
    """So many tokens of a completion that is about to end with each of 16 stop strings, and never does."""
    text = TextStream(ByteTokenizer().decoder(), STOPS)
    for _ in range(tokens):
        text.push(ord("a"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--known", type=int, default=500, help="tokens of a prompt, and as many of a completion")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument("--out", type=Path, default=results_folder())
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    head = report_head(["torch"])
    found: dict[str, Any] = {}
    for vocabulary in VOCABULARIES:
        found[str(vocabulary)] = measure(chosen.rows, vocabulary, chosen.known, chosen.repeats)
        print(vocabulary, found[str(vocabulary)])
    at_worst = {str(size): worst(WORST_ROWS, size, max(3, chosen.repeats // 8)) for size in WORST_VOCABULARIES}
    print("worst", at_worst)
    report = head | {
        "rows": chosen.rows,
        "known_tokens": 2 * chosen.known,
        "milliseconds_by_vocabulary": found,
        "worst_rows": WORST_ROWS,
        "worst_by_vocabulary": at_worst,
    }
    write_report(chosen.out / "sampling.json", report)


if __name__ == "__main__":
    main()
