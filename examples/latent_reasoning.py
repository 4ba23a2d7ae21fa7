"""Train a small model that reasons in latent steps, serve it, and print how often it is right by reasoning effort.

    python examples/latent_reasoning.py --out models/latent

The model and the tasks are those of the `bdh-cq` package (`pip install bdh-cq`, arXiv 2608.09888). A problem shows two
pairs of grids, and asks for the second grid of a third pair, which is harder than they are. In training each batch has
a number of latent steps of its own, so that one model serves every effort. A run that is interrupted goes on from its
last checkpoint when it is started again with the same arguments.
"""

from __future__ import annotations

import argparse
import json
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from bdh_cq.bdh_cq import BDH, BDHReasoningWrapper
from bdh_cq.tasks import TASKS
from openai import OpenAI
from torch import Tensor
from tqdm import trange

EFFORTS = {"none": 0, "minimal": 1, "low": 2, "medium": 4, "high": 8}
VOCABULARY = 256  # bytes
SHAPE = {"dim": 64, "depth": 4, "heads": 4, "dim_qk_heads": 1024, "rotary_dim": 64}
CONFIG, WEIGHTS, CHECKPOINT = "config.json", "model.pt", "training.state"
SAVE_EVERY = 100  # steps
PROMPTS = 100  # of one request; the server's `limits.max_prompts` is 128
HELD_OUT = 10_000_000  # seeds from here on are for the test alone

Problem = tuple[str, str]  # the prompt, and its answer


def problem(task: Any, seed: int) -> Problem:
    """A problem as text: "a>b;" for each pair of grids, one digit for each cell, row by row."""
    drawn = task.generate(seed=seed, n_demos=2, n_tests=1)
    _, asked, answer = drawn["test"][0]
    shown = "".join(f"{digits(before)}>{digits(after)};" for _, before, after in drawn["train"])
    return f"{shown}{digits(asked)}>", digits(answer)


def digits(grid: np.ndarray[Any, Any]) -> str:
    return "".join(map(str, grid.flatten().tolist()))


def batch_of(task: Any, seeds: range) -> tuple[Tensor, Tensor]:
    """Prompts [B, P] and answers [B, A] of problems that are equally long."""
    prompts, answers = zip(*(problem(task, seed) for seed in seeds))
    return torch.tensor([list(text.encode()) for text in prompts]), torch.tensor([list(t.encode()) for t in answers])


class Trainer:
    """Trains for so many minutes in all, over however many runs."""

    def __init__(self, task: Any, folder: Path, minutes: float, batch: int) -> None:
        self.model = BDHReasoningWrapper(BDH(num_tokens=VOCABULARY, **SHAPE), latent_step_embed=True)
        self._task, self._file, self._batch = task, folder / CHECKPOINT, batch
        self._seconds = minutes * 60
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
        self._step, self._spent = 0, 0.0
        if self._file.exists():
            saved = torch.load(self._file, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self._optimizer.load_state_dict(saved["optimizer"])
            self._step, self._spent = saved["step"], saved["spent"]

    def run(self) -> None:
        with trange(int(self._seconds), initial=int(self._spent), unit="s", desc="training") as progress:
            while self._spent < self._seconds:
                start = time.monotonic()
                loss = self._train()
                self._spent += time.monotonic() - start
                progress.update(int(self._spent) - progress.n)
                progress.set_postfix(steps=self._step, loss=f"{loss:.3f}")
                if self._step % SAVE_EVERY == 0:
                    self._save()
        self._save()

    def _train(self) -> float:
        rate = 2e-3 * min(1.0, (self._step + 1) / 100) * max(0.05, 1 - self._spent / self._seconds)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        prompts, answers = batch_of(self._task, range(self._step * self._batch, (self._step + 1) * self._batch))
        latent_steps = random.Random(self._step).choice(list(EFFORTS.values()))
        stages = (prompts, latent_steps, answers) if latent_steps else (torch.cat([prompts, answers], dim=1),)
        loss = self.model(*stages, return_loss=True)
        self._optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self._optimizer.step()
        self._step += 1
        return float(loss.detach())

    def _save(self) -> None:
        saved = {"model": self.model.state_dict(), "optimizer": self._optimizer.state_dict()}
        new = self._file.with_suffix(".new")
        torch.save(saved | {"step": self._step, "spent": self._spent}, new)
        new.replace(self._file)


def save(model: BDHReasoningWrapper, folder: Path) -> None:
    """A model folder that `bdh-batch serve` loads."""
    torch.save(model.state_dict(), folder / WEIGHTS)
    files = {
        CONFIG: {"model_type": "bdh-cq", "num_tokens": VOCABULARY, **SHAPE},
        "tokenizer_config.json": {"type": "byte"},
        "generation_config.json": {"temperature": 0.0, "reasoning_effort": EFFORTS},
    }
    for name, values in files.items():
        (folder / name).write_text(json.dumps(values, indent=2) + "\n", "utf-8")


@contextmanager
def served(folder: Path) -> Iterator[OpenAI]:
    """A client of a server of its own, on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bdh_batch", "serve", "--model", str(folder), "--port", str(port)]
    server = subprocess.Popen(command)
    try:
        url = f"http://127.0.0.1:{port}"
        until_ready(url, server)
        yield OpenAI(base_url=f"{url}/v1", api_key="none")
    finally:
        server.terminate()
        server.wait()


def until_ready(url: str, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        try:
            if httpx.get(f"{url}/readyz").status_code == httpx.codes.OK:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        time.sleep(0.2)
    raise SystemExit("the server did not start")


def accuracy(client: OpenAI, problems: list[Problem], effort: str) -> float:
    """The share of problems whose answer is right in every cell."""
    model = client.models.list().data[0].id
    right = 0
    for asked in batched(problems, PROMPTS):
        answers = client.completions.create(
            model=model,
            prompt=[prompt for prompt, _ in asked],
            max_tokens=len(asked[0][1]),
            temperature=0,
            extra_body={"latent_steps": EFFORTS[effort]},
        )
        right += sum(choice.text == answer for choice, (_, answer) in zip(answers.choices, asked))
    return right / len(problems)


def batched(problems: list[Problem], size: int) -> Iterator[list[Problem]]:
    for at in range(0, len(problems), size):
        yield problems[at : at + size]


def main() -> None:
    arguments = parser().parse_args()
    torch.manual_seed(0)
    task = TASKS[arguments.task](size=arguments.size)
    arguments.out.mkdir(parents=True, exist_ok=True)
    trainer = Trainer(task, arguments.out, arguments.minutes, arguments.batch)
    trainer.run()
    save(trainer.model, arguments.out)
    problems = [problem(task, seed) for seed in range(HELD_OUT, HELD_OUT + arguments.problems)]
    with served(arguments.out) as client:
        for effort, steps in EFFORTS.items():
            share = accuracy(client, problems, effort)
            print(f"{effort:8} {steps:3} latent steps  {share:6.1%} of {len(problems)} problems", flush=True)


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--out", type=Path, required=True, help="the model's folder")
    found.add_argument("--task", choices=["propagation", "copy"], default="propagation")
    found.add_argument("--size", type=int, default=6, help="of a grid's side, where the task has a choice")
    found.add_argument("--minutes", type=float, default=20, help="of training, in all runs together")
    found.add_argument("--batch", type=int, default=16)
    found.add_argument("--problems", type=int, default=200, help="that are asked; training never saw them")
    return found


if __name__ == "__main__":
    main()
