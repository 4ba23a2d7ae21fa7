"""A cache folder of its own for each test, a web server on loopback, and the smallest model."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from bdh_batch import cli
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.registry.locate import locate
from bdh_batch.registry.store import Store
from tests.registry.web import Web, running

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
CPU = torch.device("cpu")
FILES = ("config.json", "model.safetensors")

Run = Callable[..., str]


@pytest.fixture
def web() -> Iterator[Web]:
    with running() as web:
        yield web


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A model folder."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in FILES:
        shutil.copyfile(TINY / name, folder / name)
    return folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The registry that commands use."""
    monkeypatch.setenv("BDH_CACHE", str(tmp_path / "cache"))
    return Store(tmp_path / "cache")


@pytest.fixture
def run(store: Store, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command of `model` that must end well, and gives what it prints."""

    def command(*arguments: object) -> str:
        code = cli.main(["model", *map(str, arguments)])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return command


@pytest.fixture
def refused(store: Store, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command of `model` that must fail, and gives the one line that it prints."""

    def command(*arguments: object) -> str:
        assert cli.main(["model", *map(str, arguments)]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("bdh-batch: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return command


def left_in(store: Store) -> list[str]:
    """The files in the registry's folder."""
    return sorted(str(file.relative_to(store.root)) for file in store.root.rglob("*") if not file.is_dir())


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def loads(name: str) -> bool:
    """Whether the loader takes a model of the registry."""
    located = locate(Path(name))
    try:
        return load_model(located.path, torch.float32, CPU).config.n_layer > 0
    finally:
        located.close()
