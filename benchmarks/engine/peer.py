"""Decoding beside the `bdh-cq` package's own stateful generation: the same weights, in one run.

    python -m benchmarks.engine.peer                 # batches of 1 and 32, 5 rounds, about a minute
    python -m benchmarks.engine.peer --rounds 3

A model of that kind has the sizes of the bundled one, and neurons that fire as seldom as those of a trained model.
Both decode greedily from the same prompts, each from its own states, and take turns; the package computes its batch in
one tensor, with `memories`. First both have to say the same. Writes `peer.json`: tokens/s, and ratios.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from bdh_cq import BDH
from torch import Tensor
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import Model, load_model
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.cpu import CpuKernels
from bdh_batch.messages import Plan, SamplingParams, Segment
from benchmarks.common import figure, ratio, take_turns
from benchmarks.engine.synthetic import synthetic_weights
from benchmarks.report import report_head, results_folder, write_report

CONFIG = BDHConfig(n_layer=6, n_embd=128, n_head=4, mlp_internal_dim_multiplier=64, vocab_size=256)
DENSITY = 0.05  # of the neurons that fire, about what trained models have
ROTARY = 64
PROMPT, CHECKED = 64, 32  # tokens
GREEDY = SamplingParams(temperature=0.0)
CPU = torch.device("cpu")


def main(argv: Sequence[str] | None = None) -> None:
    arguments = parse(argv)
    head = report_head(["torch", "numba", "bdh-cq"])
    peer = package_model()
    model = loaded(peer)
    report: dict[str, Any] = {**head, "rounds": arguments.rounds, "tokens": arguments.tokens, "batches": {}}
    for batch in arguments.batches:
        report["batches"][str(batch)] = measured(peer, model, batch, arguments)
    write_report(arguments.out / "peer.json", report)
    print(json.dumps(report, indent=2))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="of each sequence, in a round")
    parser.add_argument("--out", type=Path, default=results_folder())
    return parser.parse_args(argv)


def package_model() -> BDH:
    """The package's model, with synthetic weights."""
    neurons = CONFIG.neurons
    sizes = {"dim": CONFIG.n_embd, "heads": CONFIG.n_head, "dim_qk_heads": neurons, "rotary_dim": ROTARY}
    peer = BDH(num_tokens=CONFIG.vocab_size, depth=CONFIG.n_layer, **sizes).eval().requires_grad_(False)
    weights = synthetic_weights(CONFIG, DENSITY)
    peer.token_embed.weight.copy_(weights.embed)
    peer.block.to_qk.weight.copy_(weights.encoder[0].mT.flatten(0, 1))
    peer.block.proj_up.copy_(weights.encoder_v[0])
    peer.block.proj_out.weight.copy_(weights.decoder[0].mT)
    peer.to_logits.weight.copy_(weights.lm_head.mT)
    return peer


def loaded(peer: BDH) -> Model:
    """The same model, by way of a file."""
    config = {"model_type": "bdh-cq", "depth": CONFIG.n_layer, "heads": CONFIG.n_head}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(peer.state_dict(), Path(folder) / "model.pt")
        (Path(folder) / "config.json").write_text(json.dumps(config))
        return load_model(Path(folder), torch.float32, CPU)


def measured(peer: BDH, model: Model, batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Figures for `batch` sequences, which go on from round to round."""
    prompts = torch.randint(0, CONFIG.vocab_size, (batch, PROMPT), generator=torch.Generator().manual_seed(batch))
    theirs, ours = package_decoder(peer, prompts), decoder(model, prompts)
    if (said := ours(CHECKED)) != theirs(CHECKED):
        raise SystemExit(f"batch {batch}: the package says something else than {said}")
    variants: dict[str, Callable[[], object]] = {
        "bdh-batch": lambda: ours(arguments.tokens),
        "bdh-cq": lambda: theirs(arguments.tokens),
    }
    with tqdm(total=arguments.rounds, desc=f"batch {batch}", unit="round") as bar:
        times = take_turns(variants, arguments.rounds, tick=bar.update)
    tokens = batch * arguments.tokens
    figures = {
        name: figure([tokens / each for each in seconds], "tokens/s", "higher") for name, seconds in times.items()
    }
    found = ratio(times["bdh-cq"], times["bdh-batch"])
    return {**figures, "times as fast": {"value": found.value, "low": found.low, "high": found.high}}


Decode = Callable[[int], list[list[int]]]  # so many more tokens of each sequence


def package_decoder(peer: BDH, prompts: Tensor) -> Decode:
    """The package's loop, for a batch: each token is fed back with the memories."""
    with torch.inference_mode():
        logits, memories = peer(prompts, return_memory=True)
    tokens = logits[:, -1].argmax(-1)

    @torch.inference_mode()
    def decode(count: int) -> list[list[int]]:
        nonlocal tokens, memories
        said = []
        for _ in range(count):
            said.append(tokens.tolist())
            logits, memories = peer(tokens[:, None], memories=memories, return_memory=True)
            tokens = logits[:, -1].argmax(-1)
        return [list(each) for each in zip(*said)]

    return decode


def decoder(model: Model, prompts: Tensor) -> Decode:
    """The engine's steps, without what surrounds them in a server, as the package has nothing of it."""
    pool = StatePool(model.config, len(prompts), CPU)
    runner = Runner(CpuKernels(model.weights), pool, model.weights.latent_embed)
    runner.warm(PROMPT)
    tokens = drawn(runner, [Segment(slot, 0, row, GREEDY) for slot, row in enumerate(prompts.tolist())])
    position = prompts.shape[1]

    def decode(count: int) -> list[list[int]]:
        nonlocal tokens, position
        said = []
        for _ in range(count):
            said.append(tokens)
            tokens = drawn(runner, [Segment(slot, position, [token], GREEDY) for slot, token in enumerate(tokens)])
            position += 1
        return [list(each) for each in zip(*said)]

    return decode


def drawn(runner: Runner, segments: list[Segment]) -> list[int]:
    return [token for token in runner.run(Plan(segments)).drawn if token is not None]


if __name__ == "__main__":
    main()
