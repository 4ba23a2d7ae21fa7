"""`model.path` names a model of the registry, and a server keeps what it serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bdh_batch import cli as command_line
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.processes.model_settings import chosen_model
from bdh_batch.registry.locate import locate
from bdh_batch.registry.store import Store
from bdh_batch.settings import load
from bdh_batch.system.cache_folder import cache_folder
from tests.registry.conftest import Run, left_in

if TYPE_CHECKING:
    from tests.conftest import ServeFactory


def test_a_server_by_name_keeps_its_files_until_it_ends(
    run: Run, serve: ServeFactory, store: Store, model: Path
) -> None:
    run("add", model, "--id", "mine")
    with serve(model=Path("mine"), env={"BDH_CACHE": str(store.root)}) as server:
        assert [each["id"] for each in server.http.get("/v1/models").json()["data"]] == ["mine"]
        assert "a server uses it" in run("remove", "mine")
        run("prune")
        assert len(left_in(store)) == 4
        response = server.http.post("/v1/completions", json={"model": "mine", "prompt": "a", "max_tokens": 3})
        assert response.status_code == 200
        assert "BDH_CACHE" not in server.log
    run("prune")
    assert left_in(store) == []


def test_an_existing_path_wins(run: Run, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("add", model, "--id", "source")
    monkeypatch.chdir(model.parent)
    assert locate(Path("source")).path == Path("source")
    monkeypatch.chdir("/")
    assert locate(Path("source")).path.is_dir()


def test_an_unknown_name_lists_what_there_is(run: Run, model: Path) -> None:
    with pytest.raises(CheckpointError, match=r"^model\.path: there is no model at none$"):
        locate(Path("none"))
    run("add", model, "--id", "one")
    run("add", model, "--id", "two")
    with pytest.raises(CheckpointError, match=r"no model at none, and none of that name .* which has: one, two$"):
        locate(Path("none"))
    assert locate(Path("no/where")).path == Path("no/where"), "the loader says what is wrong with a path"


def test_the_other_commands_know_names_too(run: Run, model: Path, tmp_path: Path) -> None:
    run("add", model, "--id", "mine")
    assert "n_layer" in run("inspect", "mine")
    run("convert", "mine", tmp_path / "native")
    assert (tmp_path / "native" / "model.safetensors").is_file()
    assert command_line.main(["plan", "--model", "mine", "--gpu", "h100"]) == 0


def test_a_server_of_an_unknown_name_does_not_start(run: Run, model: Path) -> None:
    run("add", model, "--id", "mine")
    with pytest.raises(CheckpointError, match=r"no model at none, .* which has: mine$"):
        chosen_model(load(overrides=[("model.path", "none")]).settings)


def test_the_cache_is_where_the_platform_has_it_or_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("BDH_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("BDH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "bdh-batch"
    monkeypatch.setattr("bdh_batch.system.cache_folder.user_cache_path", lambda *_, **__: Path("~/.cache/x"))
    with pytest.raises(ConfigError, match="BDH_CACHE: not set"):
        cache_folder()
