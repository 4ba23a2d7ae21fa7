"""What a model's window and the precision of its weights and states cost: loss by position, on text that it was not
trained on.

    python -m benchmarks.engine.loss --text shakespeare.txt  # of the bundled model
    python -m benchmarks.engine.loss --text my.txt --model models/my-bdh --windows 0 256 512

The last tenth of the text is cut in contexts that do not overlap. Writes `loss.json`, in nats per token:

    losses    for each window and state dtype the mean loss, whole and by position
    weights   for each dtype of the weights (`model.dtype`), with the model's window: the loss, the bytes of matrices,
              head and embedding as the kernels lay them out, and the tokens/s of decoding batches and of a prompt by
              the runner, for which the dtypes take turns
    restored  for each dtype of cached prefixes (`prefix_cache.dtype`) the loss of what follows a prefix that was kept
              in it, and how many states fit a GiB
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.engine.narrow_states import narrow_bytes
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import Kernels, Weights
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.kernels.select import select_kernels
from bdh_batch.messages import Plan, SamplingParams, Segment
from benchmarks import ROOT
from benchmarks.common import figure, take_turns
from benchmarks.report import report_head, results_folder, write_report

BUNDLED = ROOT / "models" / "bdh-shakespeare"
CHUNK = 512
DTYPES = (torch.float32, torch.bfloat16)
PREFIXES = (256, 1024, 4096)  # tokens after which a state is cached and restored
FOLLOWING = 256  # tokens whose loss is measured then
NARROW = (None, torch.bfloat16, torch.int8)  # dtypes of cached prefixes
WEIGHTS = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
BATCHES = {1: 64, 32: 8}  # sequences that decode, and steps in each timed run: positions of a window's first block
BEGUN = 64  # tokens of each
PROMPT = 1024  # tokens
SECTIONS = ("losses", "weights", "restored")


def main() -> None:
    arguments = parse()
    head = report_head(["torch", "numba"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(arguments.model, torch.float32, device)
    tokens = validation(arguments.text, arguments.context)
    sections = {
        "losses": lambda: by_window(model, tokens, arguments.windows),
        "weights": lambda: by_weights(arguments.model, device, tokens, arguments.repeats),
        "restored": lambda: [
            row
            for window in dict.fromkeys((0, model.config.suggested_window))
            for row in after_restoring(model, window, arguments.text)
        ],
    }
    report = {
        **head,
        "model": arguments.model.name,
        "contexts": len(tokens),
        "tokens_of_a_context": arguments.context,
        **{name: sections[name]() for name in arguments.only},
    }
    write_report(arguments.out / "loss.json", report)
    print(json.dumps(report, indent=2))


def by_window(model: Model, tokens: Tensor, windows: list[int]) -> list[dict[str, object]]:
    rows = []
    with tqdm(total=len(windows) * len(DTYPES) * len(tokens), unit="context") as bar:
        for window in windows:
            for dtype in DTYPES:
                bar.set_description(f"window {window}, {dtype}")
                losses = loss_by_position(model, window, dtype, tokens, bar)
                rows.append({"window": window, "state_dtype": name_of(dtype), **summary(losses)})
    return rows


def by_weights(path: Path, device: torch.device, tokens: Tensor, repeats: int) -> list[dict[str, object]]:
    """For each dtype: loss, bytes, and tokens/s, of states in float32."""
    models = {dtype: load_model(path, dtype, device) for dtype in WEIGHTS}
    config = models[torch.float32].config
    window = config.suggested_window
    pool = StatePool(config, max(BATCHES) + 1, device, window)
    chosen = {dtype: select_kernels("auto", model.weights, window) for dtype, model in models.items()}
    runs = {}
    for dtype, (kernels, _) in chosen.items():
        runner = Runner(kernels, pool)
        for size, steps in BATCHES.items():
            runs[f"{name_of(dtype)} {size}"] = partial(decode, runner, tokens, size, steps)
        runs[f"{name_of(dtype)} prompt"] = partial(read_prompt, runner, tokens)
    decode(Runner(chosen[torch.float32][0], pool), tokens, max(BATCHES), 1, begun=0)
    with tqdm(total=repeats, unit="round") as bar:
        times = take_turns(runs, repeats, tick=bar.update)

    def rates(name: str, count: int) -> dict[str, object]:
        return figure([count / seconds for seconds in times[name]], "tokens/s", "higher")

    rows: list[dict[str, object]] = []
    with tqdm(total=len(models) * len(tokens), unit="context") as bar:
        for dtype, model in models.items():
            losses = loss_by_position(model, window, torch.float32, tokens, bar)
            decoded = {
                f"batch {size}": rates(f"{name_of(dtype)} {size}", size * steps) for size, steps in BATCHES.items()
            }
            rows.append(
                {
                    "dtype": name_of(dtype),
                    "kernels": chosen[dtype][1],
                    "window": window,
                    "bytes": bytes_read(chosen[dtype][0], model.weights),
                    **summary(losses),
                    "tokens_per_s": {**decoded, "prompt": rates(f"{name_of(dtype)} prompt", PROMPT)},
                }
            )
    return rows


def bytes_read(kernels: Kernels, weights: Weights) -> int:
    if isinstance(kernels, CpuKernels):
        return sum(array.nbytes for array in (*kernels._packed, *kernels._head))
    return sum(getattr(weights, name).nbytes for name in ("embed", "encoder", "encoder_v", "decoder", "lm_head"))


def decode(runner: Runner, tokens: Tensor, size: int, steps: int, begun: int = BEGUN) -> None:
    """Steps of one token of each of `size` sequences; with `begun` 0, the first takes them through their prompts."""
    for step in range(steps):
        position = begun + step
        length = 1 if position else BEGUN
        rows = [tokens.flatten()[97 * slot + position :][:length].tolist() for slot in range(size)]
        sampling = [SamplingParams(temperature=0.8, seed=slot) for slot in range(size)]
        runner.run(Plan([Segment(slot, position, row, sampling[slot]) for slot, row in enumerate(rows)]))


def read_prompt(runner: Runner, tokens: Tensor) -> None:
    for start in range(0, PROMPT, CHUNK):
        runner.forward([Segment(max(BATCHES), start, tokens.flatten()[start : start + CHUNK].tolist(), None)])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="a file whose bytes are the tokens")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a model folder")
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 256, 512, 1024, 2048])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--repeats", type=int, default=15, help="rounds in which the dtypes of the weights are timed")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args()


def validation(text: Path, context: int) -> Tensor:
    """[contexts, context + 1]: the last tenth of a file; neighbours share the token between them."""
    data = text.read_bytes()
    kept = data[int(len(data) * 0.9) :]
    if len(kept) <= context:
        sys.exit(f"--text: its last tenth has {len(kept)} bytes, not more than --context {context}")
    return torch.tensor(list(kept)).unfold(0, context + 1, context)


def loss_by_position(model: Model, window: int, dtype: torch.dtype, tokens: Tensor, bar: tqdm[Any]) -> Tensor:
    """Mean over the contexts: nats [context]."""
    device = model.weights.embed.device
    kernels, _ = select_kernels("auto", model.weights, window)
    runner = Runner(kernels, StatePool(model.config, 1, device, window, dtype))
    total = torch.zeros(tokens.shape[1] - 1)
    with torch.inference_mode():
        for row in tokens:
            for start in range(0, len(total), CHUNK):
                targets = row[start + 1 : start + CHUNK + 1]
                segment = Segment(0, start, row[start : start + len(targets)].tolist(), None)
                logits = runner.logits([segment]).cpu()
                total[start : start + CHUNK] += F.cross_entropy(logits, targets, reduction="none")
            bar.update()
    return total / len(tokens)


def after_restoring(model: Model, window: int, text: Path) -> list[dict[str, object]]:
    """For each length of a prefix and each dtype that its float32 state is cached in: the loss of what follows it."""
    device = model.weights.embed.device
    kernels, _ = select_kernels("auto", model.weights, window)
    rows: list[dict[str, object]] = []
    for length in PREFIXES:
        contexts = validation(text, length + FOLLOWING)
        for dtype in tqdm(NARROW, desc=f"window {window}, restored after {length}"):
            pool = StatePool(model.config, 1, device, window, host_slots=1, host_dtype=dtype)
            runner, total = Runner(kernels, pool), torch.zeros(FOLLOWING)
            with torch.inference_mode():
                for context in contexts:
                    for start in range(0, length, CHUNK):
                        tokens = context[start : min(start + CHUNK, length)].tolist()
                        runner.forward([Segment(0, start, tokens, None)])
                    pool.copy(0, 1)
                    pool.clear(0)
                    pool.copy(1, 0)
                    logits = runner.logits([Segment(0, length, context[length:-1].tolist(), None)]).cpu()
                    total += F.cross_entropy(logits, context[length + 1 :], reduction="none")
            size = pool.states[0].nbytes if dtype is None else narrow_bytes(pool.states.shape[1:], dtype)
            rows.append(
                {
                    "window": window,
                    "prefix": length,
                    "prefix_dtype": name_of(dtype or torch.float32),
                    "contexts": len(contexts),
                    "loss": float(total.mean() / len(contexts)),
                    "states_per_gib": 2**30 // size,
                }
            )
    return rows


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def summary(losses: Tensor) -> dict[str, object]:
    edges = [0, *(1 << power for power in range(7, 30) if 1 << power < len(losses)), len(losses)]
    return {
        "loss": float(losses.mean()),
        "by_position": {f"{begin}-{end}": float(losses[begin:end].mean()) for begin, end in pairwise(edges)},
    }


if __name__ == "__main__":
    main()
