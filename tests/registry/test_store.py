"""What the registry keeps stays right, whatever its manifests say and whoever uses it at the same time."""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from bdh_batch.errors import CheckpointError
from bdh_batch.registry.add import AddOptions, add
from bdh_batch.registry.locate import locate
from bdh_batch.registry.locks import locked, locked_if_free, share
from bdh_batch.registry.store import Store
from tests.conftest import eventually
from tests.registry.conftest import Run, left_in, loads

ROUNDS = 25


def first(values: dict[str, Any]) -> dict[str, Any]:
    return dict(values["files"][0])


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda values: {"version": 2}, "version 2"),
        (lambda values: {"version": None}, "version None"),
        (lambda values: {"id": "other"}, "is the manifest of 'other'"),
        (lambda values: {"format": "gguf"}, "format: "),
        (lambda values: {"entry": "other.pt"}, "the entry is not one of the files"),
        (lambda values: {"files": []}, "files: "),
        (lambda values: {"files": values["files"] * 2}, "a file is listed twice"),
        (lambda values: {"files": [first(values) | {"name": "../../etc/passwd"}]}, "files.0.name: "),
        (lambda values: {"files": [first(values) | {"name": "x" * 201}]}, "files.0.name: "),
        (lambda values: {"files": [first(values) | {"sha256": "../../../etc/passwd"}]}, "files.0.sha256: "),
        (lambda values: {"files": [first(values) | {"size": -1}]}, "files.0.size: "),
        (lambda values: {"created": "yesterday"}, "created: "),
        (lambda values: {"runes": 1}, "runes: "),
    ],
)
def test_a_manifest_that_is_none_is_refused(
    run: Run,
    refused: Run,
    store: Store,
    model: Path,
    change: Callable[[dict[str, Any]], dict[str, Any]],
    part: str,
) -> None:
    run("add", model, "--id", "mine")
    file = store.root / "manifests" / "mine.json"
    values = json.loads(file.read_text())
    file.write_text(json.dumps(values | change(values)))
    line = refused("show", "mine")
    assert str(file) in line
    assert part in line
    with pytest.raises(CheckpointError):
        locate(Path("mine"))
    run("remove", "mine")
    run("prune")
    assert left_in(store) == []


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 10_000, b'{"version": 1, "version": 1}'])
def test_neither_is_any_other_file(run: Run, refused: Run, store: Store, model: Path, content: bytes) -> None:
    run("add", model, "--id", "mine")
    (store.root / "manifests" / "mine.json").write_bytes(content)
    assert "mine.json" in refused("verify")
    run("add", model, "--id", "mine", "--force")
    run("verify")


def test_what_cannot_be_published_leaves_nothing(refused: Run, store: Store, model: Path) -> None:
    store.root.mkdir()
    (store.root / "manifests").write_text("a file where a folder should be")
    assert "cannot be used (File exists)" in refused("add", model, "--id", "mine", "--force")
    assert left_in(store) == ["manifests"]


def test_the_registry_may_be_moved(run: Run, store: Store, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", model, "--id", "mine")
    moved = store.root.rename(store.root.with_name("moved"))
    monkeypatch.setenv("BDH_CACHE", str(moved))
    assert loads("mine")
    assert "as it was added" in run("verify")


def test_whatever_happens_at_once_the_models_stay_right(store: Store, model: Path, tmp_path: Path) -> None:
    """Two add, forget and add again, models that share a file; others prune and load meanwhile."""
    other = shutil.copytree(model, tmp_path / "other")
    (other / "generation_config.json").write_text("{}")
    sources = {"a": model, "b": other, "c": model}
    done = threading.Event()

    def change(seed: int) -> None:
        chosen = random.Random(seed)
        for _ in range(ROUNDS):
            name = chosen.choice("abc")
            add(store, str(sources[name]), name, AddOptions(most_bytes=10**9, replace=True))
            if chosen.random() < 0.5:
                ignoring_unknown(lambda: store.remove(chosen.choice("abc")))

    def prune() -> None:
        while not done.wait(0.001):
            store.prune()

    def load() -> None:
        while not done.wait(0.001):
            ignoring_unknown(lambda: loads("a"))

    with ThreadPoolExecutor(4) as pool:
        others = [pool.submit(prune), pool.submit(load)]
        changes = [pool.submit(change, seed) for seed in range(2)]
        try:
            for each in changes:
                each.result(300)
        finally:
            done.set()
        for each in others:
            each.result(300)
    add(store, str(model), "a", AddOptions(most_bytes=10**9, replace=True))
    store.prune()
    assert not [problem for name in store.names() for problem in store.problems(store.read(name))]
    names = {file.sha256 for name in store.names() for file in store.read(name).files}
    assert {blob.name for blob in store.blob("x").parent.iterdir()} == names
    assert not any((store.root / "staging").iterdir())


def ignoring_unknown(action: Callable[[], object]) -> None:
    """Another may have removed the model just before."""
    try:
        action()
    except CheckpointError as error:
        if not any(part in str(error) for part in ("the registry has no model", "no model at", "are gone")):
            raise


class TestLocks:
    def test_a_folder_is_held_by_one_or_shared_by_many(self, tmp_path: Path) -> None:
        folder = tmp_path / "folder"
        with locked(folder), locked_if_free(folder) as free:
            assert not free
            with pytest.raises(FileNotFoundError):
                share(folder)
        handles = [share(folder), share(folder)]
        with locked_if_free(folder) as free:
            assert not free
        for handle in handles:
            os.close(handle)
        with locked_if_free(folder) as free:
            assert free

    def test_who_waits_for_a_folder_that_is_deleted_gets_a_new_one(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        folder = tmp_path / "folder"

        def wait() -> bool:
            with locked(folder):
                return folder.is_dir()

        with ThreadPoolExecutor(1) as pool:
            with locked(folder):
                waiting = pool.submit(wait)
                eventually(lambda: "waiting for another process" in caplog.text)
                shutil.rmtree(folder)
            assert waiting.result(300)

    def test_what_is_not_there_is_not_free(self, tmp_path: Path) -> None:
        with locked_if_free(tmp_path / "none") as free:
            assert not free
