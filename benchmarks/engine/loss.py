"""What a model's window and the precision of its states cost: loss by position, on text that it was not trained on.

    python -m benchmarks.engine.loss --text shakespeare.txt  # of the bundled model
    python -m benchmarks.engine.loss --text my.txt --model models/my-bdh --windows 0 256 512

The last tenth of the text is cut in contexts that do not overlap. Writes `loss.json`: for each
window and state dtype the mean loss in nats per token, whole and by position.
"""

from __future__ import annotations

import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.select import select_kernels
from bdh_batch.messages import Segment
from benchmarks import ROOT
from benchmarks.report import report_head, results_folder, write_report

BUNDLED = ROOT / "models" / "bdh-shakespeare"
CHUNK = 512
DTYPES = (torch.float32, torch.bfloat16)


def main() -> None:
    arguments = parse()
    head = report_head(["torch", "numba"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(arguments.model, torch.float32, device)
    tokens = validation(arguments.text, arguments.context)
    rows = []
    with tqdm(total=len(arguments.windows) * len(DTYPES) * len(tokens), unit="context") as bar:
        for window in arguments.windows:
            for dtype in DTYPES:
                bar.set_description(f"window {window}, {dtype}")
                losses = loss_by_position(model, window, dtype, tokens, bar)
                rows.append({"window": window, "state_dtype": str(dtype).removeprefix("torch."), **summary(losses)})
    report = {
        **head,
        "model": arguments.model.name,
        "contexts": len(tokens),
        "tokens_of_a_context": arguments.context,
        "losses": rows,
    }
    write_report(arguments.out / "loss.json", report)
    print(json.dumps(report, indent=2))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--text", type=Path, required=True, help="a file whose bytes are the tokens")
    parser.add_argument("--model", type=Path, default=BUNDLED, help="a model folder")
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 256, 512, 1024, 2048])
    parser.add_argument("--context", type=int, default=4096)
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


def summary(losses: Tensor) -> dict[str, object]:
    edges = [0, *(1 << power for power in range(7, 30) if 1 << power < len(losses)), len(losses)]
    return {
        "loss": float(losses.mean()),
        "by_position": {f"{begin}-{end}": float(losses[begin:end].mean()) for begin, end in pairwise(edges)},
    }


if __name__ == "__main__":
    main()
