"""The example that trains a model with latent steps: what it writes is a folder that the server loads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model

EXAMPLE = Path(__file__).parents[1] / "examples" / "latent_reasoning.py"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("latent_reasoning", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPE", {"dim": 16, "depth": 2, "heads": 2, "dim_qk_heads": 32, "rotary_dim": 8})
    return module


def test_a_problem_is_text(example: ModuleType) -> None:
    task = example.TASKS["propagation"](size=4)
    prompt, answer = example.problem(task, 3)
    demos = prompt.split(";")
    assert [len(each) for each in demos] == [33, 33, 17]
    assert len(answer) == 16
    assert (prompt, answer) == example.problem(task, 3) != example.problem(task, 4)


def test_a_run_goes_on_and_its_folder_loads(example: ModuleType, tmp_path: Path) -> None:
    task = example.TASKS["propagation"](size=4)
    trainer = example.Trainer(task, tmp_path, minutes=1e-6, batch=2)
    for _ in range(6):  # with several numbers of latent steps
        trainer._train()
    trainer._save()
    again = example.Trainer(task, tmp_path, minutes=1e-6, batch=2)
    again.run()
    assert again._step == 7  # its time is over after one more
    example.save(again.model, tmp_path)
    model = load_model(tmp_path, torch.float32, torch.device("cpu"))
    assert model.config.latent_steps
    assert model.weights.latent_embed is not None
    assert torch.equal(model.weights.embed, again.model.bdh.token_embed.weight.detach())


def test_it_asks_a_server_with_every_effort(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(example, "PROMPTS", 2)
    options = ["--out", str(tmp_path), "--size", "4", "--minutes", "1e-6", "--batch", "2", "--problems", "3"]
    monkeypatch.setattr("sys.argv", ["latent_reasoning.py", *options])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [[name, str(steps)] for name, steps in example.EFFORTS.items()]
    assert all(line.endswith("% of 3 problems") for line in lines)
