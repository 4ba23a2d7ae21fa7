"""The training example, in seconds: it learns, goes on where it was stopped, and writes what the server loads."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.torch_reference import TorchKernels

SCRIPT = Path(__file__).parent.parent / "examples" / "train_bdh.py"
CPU = torch.device("cpu")
SHAPE = ["--layers", "2", "--width", "32", "--heads", "2", "--multiplier", "8", "--device", "cpu"]


@pytest.fixture(scope="module")
def train() -> ModuleType:
    spec = importlib.util.spec_from_file_location("train_bdh", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["train_bdh"] = module
    spec.loader.exec_module(module)
    return module


def run(train: ModuleType, text: Path, out: Path, *arguments: str) -> None:
    options = train.parser().parse_args(["--text", str(text), "--out", str(out), *SHAPE, *arguments])
    train.Trainer(options).run()


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_bytes(b"To be, or not to be, that is the question. " * 300)
    return file


def test_a_run_that_was_stopped_ends_like_one_that_was_not(train: ModuleType, text: Path, tmp_path: Path) -> None:
    stages = ("--stages", "4x64:6,1x512:3", "--eval-every", "4", "--no-bf16")
    run(train, text, tmp_path / "whole", *stages)
    stopped = train.Trainer(
        train.parser().parse_args(["--text", str(text), "--out", str(tmp_path / "parts"), *SHAPE, *stages])
    )
    while stopped.step < 4:
        stopped._train_step(stopped.model, stopped.stages[0])
        stopped.step += 1
    stopped._save()
    run(train, text, tmp_path / "parts", *stages)

    whole, parts = (load_model(tmp_path / name, torch.float32, CPU).weights for name in ("whole", "parts"))
    # Dropout draws from a stream of its own, which a restart begins anew: near, not equal.
    assert torch.allclose(whole.encoder, parts.encoder, atol=0.02)
    report = json.loads((tmp_path / "whole" / "validation.json").read_text())
    assert 0 < report["0-32"] < 5.5


def test_the_trainer_and_the_server_compute_the_same(train: ModuleType, text: Path, tmp_path: Path) -> None:
    run(train, text, tmp_path / "m", "--stages", "4x64:30", "--no-bf16")
    model = load_model(tmp_path / "m", torch.float32, CPU)
    trained = train.BDH(model.config)
    trained.load_state_dict(torch.load(tmp_path / "m" / "training.pt", weights_only=True)["model"])
    tokens = torch.randint(256, (1, 512))
    kernels, pool = TorchKernels(model.weights), StatePool(model.config, 1, CPU)
    pool.clear(0)
    batch = RaggedBatch(tokens[0], torch.arange(512), [0, 512], [0])
    served = kernels.logits(kernels.forward(pool.states, batch))
    with torch.no_grad():
        expected = trained.eval()(tokens)[0]
    assert (served - expected).norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(("stages", "names"), [("1x300:1", "128"), ("1x4096:1", "short"), ("4-64:1", "stages")])
def test_what_cannot_be_trained_is_refused(
    train: ModuleType, text: Path, tmp_path: Path, stages: str, names: str
) -> None:
    with pytest.raises(SystemExit, match=names):
        run(train, text, tmp_path / "m", "--stages", stages)
