"""`bdh-batch model add hf:ORG/NAME[@REV]`, against a server that speaks the Hub's protocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from bdh_batch.registry import download
from bdh_batch.registry.store import Store
from tests.registry.conftest import FILES, Run, left_in, loads, sha256
from tests.registry.web import COMMIT, Web

if TYPE_CHECKING:
    from tests.conftest import Cli


@pytest.fixture
def hub(web: Web, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Web:
    """A Hub with one repository."""
    web.repositories["org/name"] = {file.name: file.read_bytes() for file in model.iterdir()} | {
        "README.md": b"",
        "onnx/model.onnx": b"x" * 5000,
        "pytorch_model.bin": b"x" * 5000,
    }
    monkeypatch.setattr(download, "FIRST_PAUSE", 0.0)
    monkeypatch.setenv("HF_ENDPOINT", web.url)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    # The library asks huggingface.co once a day for a list that this file holds; the environment is read at its import.
    agents = tmp_path / "agents.json"
    agents.write_text(json.dumps({"standardEnvVars": [], "harnesses": {}}))
    monkeypatch.setattr("huggingface_hub.constants.AGENT_HARNESSES_PATH", str(agents))
    return web


def test_the_program_finds_the_hub_by_its_environment(cli: Cli, hub: Web, store: Store, tmp_path: Path) -> None:
    environment = {"BDH_CACHE": str(store.root), "HF_HOME": str(tmp_path / "hf")}
    ended = cli("model", "add", "hf:org/name", "--id", "mine", env=environment)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert loads("mine")


def test_a_repository(run: Run, hub: Web, store: Store) -> None:
    run("add", "hf:org/name@v1", "--id", "mine")
    manifest = store.read("mine")
    assert (manifest.source, manifest.revision) == ("hf:org/name@v1", COMMIT)
    assert [file.name for file in manifest.files] == list(FILES)
    assert loads("mine")
    (weights,) = [path for path, _ in hub.asked if path.startswith("/cdn/")]
    assert "authorization" not in hub.of(weights)[0], "the token is the Hub's alone"
    assert hub.of(f"/org/name/resolve/{COMMIT}/config.json")[0]["authorization"] == "Bearer hf_secret"


def test_a_tokenizer_in_a_folder_of_its_own(run: Run, hub: Web, store: Store) -> None:
    hub.repositories["org/name"]["tokenizer/tokenizer_config.json"] = b'{"type": "byte"}'
    run("add", "hf:org/name", "--id", "mine")
    assert [file.name for file in store.read("mine").files] == [*FILES, "tokenizer_config.json"]


def test_a_download_that_is_cut_off_goes_on(run: Run, hub: Web, model: Path) -> None:
    path = f"/cdn/{sha256(model / 'model.safetensors')}"
    hub.cuts[path] = [10, 50_000, 100_000]
    run("add", "hf:org/name", "--id", "mine")
    assert [headers.get("range") for headers in hub.of(path)] == [
        None,
        "bytes=10-",
        "bytes=50010-",
        "bytes=150010-",
    ]
    assert loads("mine")


def test_a_file_that_is_not_what_the_hub_says(refused: Run, hub: Web, store: Store) -> None:
    hub.repositories["org/name"]["model.safetensors"] += b"x"
    path = f"/cdn/{hashlib.sha256(hub.repositories['org/name']['model.safetensors']).hexdigest()}"
    hub.redirects[path] = "/other"
    hub.files["/other"] = b"another file"
    assert "was expected" in refused("add", "hf:org/name", "--id", "mine")
    assert left_in(store) == []


def test_what_is_refused(refused: Run, hub: Web, store: Store) -> None:
    assert "no such repository" in refused("add", "hf:org/none", "--id", "mine")
    assert "no such revision" in refused("add", "hf:org/name@v2", "--id", "mine")
    del hub.repositories["org/name"]["model.safetensors"]
    assert "--allow-pickle" in refused("add", "hf:org/name", "--id", "mine")
    del hub.repositories["org/name"]["pytorch_model.bin"]
    assert "hf:org/name should hold model.safetensors" in refused("add", "hf:org/name", "--id", "mine")
    hub.statuses["/api/models/org/name"] = [500]
    assert "the Hub cannot be asked" in refused("add", "hf:org/name", "--id", "mine")
    assert left_in(store) == []
