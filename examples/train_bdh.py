"""Train a byte-level BDH on any text file and write a model folder that `bdh-batch serve` loads.

    python examples/train_bdh.py --text shakespeare.txt --out models/my-bdh

The forward pass is upstream's (pathwaycom/bdh), with one change: contexts longer than a chunk use the chunked form of
the same recurrence, so that the cost of a byte hardly grows with the length of the context it is trained at.
Training runs in stages of growing context ("16x128:2400" is 2400 steps of 16 sequences of 128 bytes): short contexts
are where a step teaches most per second, and every length that the model is to work at has to be trained.

A run can be interrupted at any time and goes on from its last checkpoint when started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bdh_batch.checkpoint.checkpoint import save_model
from bdh_batch.checkpoint.config import BDHConfig, rope_frequencies

CHUNK = 128

Forward = Callable[[Tensor], Tensor]
Progress: TypeAlias = "tqdm[Any]"


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps, each on `batch` sequences of `context` bytes."""

    batch: int
    context: int
    steps: int

    @classmethod
    def parse(cls, text: str) -> Stage:
        match = re.fullmatch(r"(\d+)x(\d+):(\d+)", text.strip())
        if match is None:
            raise SystemExit(f"--stages: {text!r} is not like 16x128:2400 (batch x context : steps)")
        stage = cls(*map(int, match.groups()))
        if stage.context > 2 * CHUNK and stage.context % CHUNK:
            raise SystemExit(f"--stages: a context over {2 * CHUNK} must be a multiple of {CHUNK}, not {stage.context}")
        return stage


class BDH(nn.Module):
    """The trainable model; its `state_dict` has upstream's keys and shapes."""

    def __init__(self, config: BDHConfig) -> None:
        super().__init__()
        self.config = config
        heads, width, neurons = config.n_head, config.n_embd, config.neurons_per_head
        self.embed = nn.Embedding(config.vocab_size, width)
        self.encoder = nn.Parameter(torch.empty(heads, width, neurons))
        self.encoder_v = nn.Parameter(torch.empty(heads, width, neurons))
        self.decoder = nn.Parameter(torch.empty(heads * neurons, width))
        self.lm_head = nn.Parameter(torch.empty(width, config.vocab_size))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits [B, T, vocabulary] for tokens [B, T]."""
        batch, length = tokens.shape
        encoder, encoder_v = split_pairs(self.encoder, -1), split_pairs(self.encoder_v, -1)
        decoder = split_pairs(self.decoder.view_as(self.encoder.mT), 1).flatten(0, 1)
        cos, sin = (angles.to(tokens.device) for angles in rotation(self.config, length))
        kept = self._kept_neurons(batch, tokens.device)
        x = layer_norm(self.embed(tokens))
        for _ in range(self.config.n_layer):
            fired = F.relu(x[:, None] @ encoder)
            y = layer_norm(attend(rotate(fired, cos, sin), x))
            gated = fired * F.relu(y @ encoder_v)
            if kept is not None:
                gated = gated * kept.to(gated.dtype)
            x = layer_norm(x + layer_norm(gated.transpose(1, 2).flatten(2) @ decoder))
        return x @ self.lm_head

    def _kept_neurons(self, batch: int, device: torch.device) -> Tensor | None:
        """Dropout mask [B, h, 1, N]: one draw for all positions and layers, as the layers share their weights."""
        if not self.training or not self.config.dropout:
            return None
        shape = (batch, self.config.n_head, 1, self.config.neurons_per_head)
        return F.dropout(torch.ones(shape, device=device), self.config.dropout)


def split_pairs(weights: Tensor, dim: int) -> Tensor:
    """Neurons 0, 2, 4, … before 1, 3, 5, …: RoPE then turns two contiguous halves, which vectorises."""
    neurons = torch.arange(weights.shape[dim], device=weights.device)
    return weights.index_select(dim, torch.cat((neurons[::2], neurons[1::2])))


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:])


def rotation(config: BDHConfig, length: int) -> tuple[Tensor, Tensor]:
    """cos and sin [length, N/2] of the RoPE angles at positions 0 … length − 1."""
    frequencies = rope_frequencies(config.neurons_per_head)[::2].double()
    phases = torch.arange(length, dtype=torch.float64)[:, None] * frequencies
    angles = (phases % 1) * (2 * math.pi)
    return angles.cos().float(), angles.sin().float()


class Rotate(torch.autograd.Function):
    """RoPE of [..., T, N] whose pairs are split into halves, without keeping what autograd would keep."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin = cos.to(q.dtype), sin.to(q.dtype)
        ctx.save_for_backward(cos, sin)
        return turn(q, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return turn(grad, cos, -sin), None, None


def rotate(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated: Tensor = Rotate.apply(q, cos, sin)  # type: ignore[no-untyped-call]
    return rotated


def turn(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned = torch.empty_like(q)
    (even, odd), (first, second) = q.chunk(2, dim=-1), turned.chunk(2, dim=-1)
    torch.mul(even, cos, out=first).addcmul_(odd, sin, value=-1)
    torch.mul(odd, cos, out=second).addcmul_(even, sin)
    return turned


def attend(q: Tensor, x: Tensor) -> Tensor:
    """Strictly causal linear attention: y_t = Σ_{s<t} (q_t · q_s) x_s, for q [B, h, T, N] and x [B, T, D]."""
    batch, heads, length, neurons = q.shape
    if length <= 2 * CHUNK:
        return (q @ q.mT).tril(-1) @ x.to(q.dtype)[:, None]
    chunks = length // CHUNK
    q = q.view(batch, heads, chunks, CHUNK, neurons)
    x = x.to(q.dtype).view(batch, 1, chunks, CHUNK, -1)
    within = (q @ q.mT).tril(-1) @ x
    written = q[:, :, :-1].mT @ x[:, :, :-1]
    before = written.float().cumsum(2).to(q.dtype)  # the state that each chunk but the first finds
    across = q[:, :, 1:] @ before
    return torch.cat((within[:, :, :1], within[:, :, 1:] + across), dim=2).flatten(2, 3)


class Text:
    """A file's bytes; the last tenth is kept for validation."""

    def __init__(self, path: Path) -> None:
        data = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.uint8).long()
        split = int(0.9 * len(data))
        self.train, self.validation = data[:split], data[split:]

    def sample(self, batch: int, context: int, generator: torch.Generator) -> Tensor:
        """[batch, context + 1] bytes from random places of the training split."""
        starts = torch.randint(len(self.train) - context, (batch,), generator=generator)
        return torch.stack([self.train[s : s + context + 1] for s in starts.tolist()])


@torch.no_grad()
def loss_by_position(model: nn.Module, data: Tensor, context: int, windows: int | None = None) -> Tensor:
    """Mean loss [context] in nats per byte at each position, over `data` cut into windows that do not overlap.

    The last window is shorter: it is padded for the model, and what the padding would lose is not counted.
    """
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros(context, dtype=torch.float64)
    count = torch.zeros(context, dtype=torch.float64)
    starts = range(0, len(data) - 1, context)[:windows]
    for start in tqdm(starts, desc="validation", leave=False, disable=len(starts) < 8):
        row = data[start : start + context + 1]
        inputs = F.pad(row[:-1], (0, context + 1 - len(row)))
        logits = model(inputs[None].to(device))[0, : len(row) - 1].float().cpu()
        total[: len(row) - 1] += F.cross_entropy(logits, row[1:], reduction="none").double()
        count[: len(row) - 1] += 1
    model.train()
    return total / count


def learning_rate(step: int, total: int, peak: float, warmup: int = 100) -> float:
    """Linear warm-up, then linear decay to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * (0.01 + 0.99 * (total - step) / (total - warmup))


class Trainer:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.text = Text(options.text)
        self.stages = [Stage.parse(part) for part in options.stages.split(",")]
        self.total = sum(stage.steps for stage in self.stages)
        longest = max(stage.context for stage in self.stages)
        if len(self.text.validation) <= longest:
            raise SystemExit(f"--text: too short; its last tenth must be longer than the longest context, {longest}")
        torch.manual_seed(options.seed)
        config = BDHConfig(
            n_layer=options.layers,
            n_embd=options.width,
            n_head=options.heads,
            mlp_internal_dim_multiplier=options.multiplier,
            vocab_size=256,
            dropout=options.dropout,
            trained_context=longest,
        )
        self.device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = BDH(config).to(self.device)
        matrices = [p for name, p in self.model.named_parameters() if name != "embed.weight"]
        groups = [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": [self.model.embed.weight], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.98))
        self.step = 0
        self.history: list[dict[str, float]] = []
        self.checkpoint = options.out / "training.pt"
        if self.checkpoint.exists():
            self._resume()

    def _resume(self) -> None:
        saved = torch.load(self.checkpoint, map_location=self.device, weights_only=True)
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.step, self.history = saved["step"], saved["history"]
        print(f"resuming at step {self.step} of {self.total}")

    def _save(self) -> None:
        self.options.out.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "config": self.model.config.to_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "history": self.history,
        }
        scratch = self.checkpoint.with_suffix(".tmp")
        torch.save(state, scratch)
        scratch.replace(self.checkpoint)

    def run(self) -> None:
        model: Forward = torch.compile(self.model, dynamic=False) if self.options.compile else self.model
        bar: Progress = tqdm(total=self.total, initial=self.step, unit="step")
        first = 0
        for stage in self.stages:
            bar.set_description(f"{stage.batch} x {stage.context}")
            for step in range(max(first, self.step), first + stage.steps):
                loss = self._train_step(model, stage)
                bar.update()
                bar.set_postfix(loss=f"{loss:.3f}")
                self.history.append({"step": step, "context": stage.context, "train": loss})
                self.step = step + 1
                if self.step % self.options.eval_every == 0:
                    self._evaluate(stage, bar)
            first += stage.steps
        bar.close()
        self._finish()

    def _train_step(self, model: Forward, stage: Stage) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, self.total, self.options.lr)
        # Seeded by the step, so that a resumed run sees the bytes that an undisturbed one would have seen.
        generator = torch.Generator().manual_seed(self.options.seed * 1_000_003 + self.step)
        rows = self.text.sample(stage.batch, stage.context, generator).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            logits = model(rows[:, :-1])
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def _evaluate(self, stage: Stage, bar: Progress) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.bf16):
            losses = loss_by_position(self.model, self.text.validation, max(stage.context, 512), 7)
        mean = losses[min(128, stage.context // 2) : stage.context].mean().item()
        self.history.append({"step": self.step, "context": stage.context, "validation": mean})
        bar.write(f"step {self.step}: validation loss {mean:.3f} (late positions, context {stage.context})")
        self._save()

    def _finish(self) -> None:
        self._save()
        losses = loss_by_position(self.model, self.text.validation, self.model.config.trained_context or 512)
        edges = [0, 32, *(2**k for k in range(7, 20) if 2**k < len(losses)), len(losses)]
        report = {f"{a}-{b}": round(losses[a:b].mean().item(), 4) for a, b in pairwise(edges)}
        print("validation loss by position:", json.dumps(report))
        weights = {name: tensor.cpu() for name, tensor in self.model.state_dict().items()}
        save_model(self.options.out, self.model.config, weights, {"temperature": 0.8})
        (self.options.out / "validation.json").write_text(json.dumps(report, indent=2) + "\n")
        plot(self.history, losses, self.options.out / "loss.svg")
        print(f"wrote {self.options.out}; talk to it with: bdh-batch serve --model {self.options.out}")


def plot(history: list[dict[str, float]], losses: Tensor, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4))
    for kind in ("train", "validation"):
        points = [(entry["step"], entry[kind]) for entry in history if kind in entry]
        left.plot(*zip(*points), label=kind, linewidth=0.6 if kind == "train" else 1.5)
    left.set(xlabel="step", ylabel="loss (nats per byte)", ylim=(1.0, 3.0))
    left.legend()
    right.plot([part.mean().item() for part in losses.tensor_split(min(64, len(losses)))])
    right.set(xlabel=f"position × {min(64, len(losses))} / {len(losses)}", ylabel="validation loss (nats per byte)")
    figure.tight_layout()
    figure.savefig(path)


def parser() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = options.add_argument
    add("--text", type=Path, required=True, help="the text file; its last tenth is used for validation")
    add("--out", type=Path, required=True, help="the model folder to write; also holds the checkpoint to resume from")
    add("--stages", default="16x128:2000,8x256:500,4x512:400,2x1024:350,1x2048:700", help="batch x context : steps, …")
    add("--layers", type=int, default=6)
    add("--width", type=int, default=128)
    add("--heads", type=int, default=4)
    add("--multiplier", type=int, default=32, help="neurons in all heads together, per unit of width")
    add("--dropout", type=float, default=0.1)
    add("--lr", type=float, default=2e-3, help="peak learning rate")
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=1)
    add("--eval-every", type=int, default=100, help="steps between validations, each of which saves a checkpoint")
    add("--device", help="cuda or cpu; by default cuda where there is a GPU")
    add("--bf16", action=argparse.BooleanOptionalAction, default=True, help="bfloat16 autocast")
    add("--compile", action="store_true", help="torch.compile the model (worth it on a GPU)")
    return options


if __name__ == "__main__":
    started = time.monotonic()
    Trainer(parser().parse_args()).run()
    print(f"done in {(time.monotonic() - started) / 60:.0f} minutes")
