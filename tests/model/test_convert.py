"""Converting: what comes along, and that a target is written whole, or not touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from bdh_batch.checkpoint import convert as convert_module
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.checkpoint.config import BDHConfig, Given
from bdh_batch.checkpoint.convert import convert
from bdh_batch.errors import CheckpointError
from tests.model import formats
from tests.model.formats import CPU, random_state

CONFIG = BDHConfig(n_layer=2, n_embd=4, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=256)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    return formats.trainer(folder, CONFIG, random_state(CONFIG))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_native_folder_is_written(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "deep" / "target")
    target = tmp_path / "deep" / "target"
    files = content(target)
    assert files.keys() == {"config.json", "model.safetensors", "generation_config.json", "tokenizer_config.json"}
    assert json.loads(files["config.json"]) == CONFIG.to_dict() | {
        **{"trained_context": 128, "norm": "every_layer", "rope_layout": "interleaved", "rope_theta": 65536.0}
    }
    assert json.loads(files["tokenizer_config.json"]) == {"type": "byte"}
    assert json.loads(files["generation_config.json"]) == {}
    assert len({path.stat().st_mode for path in target.iterdir()}) == 1  # whoever may read one may read all
    assert [path.name for path in target.parent.iterdir()] == ["target"]
    state = load_model(target, torch.float32, CPU).weights
    assert torch.equal(state.encoder[0], random_state(CONFIG)["encoder"])


def test_tokenizer_template_and_defaults_come_along(source: Path, tmp_path: Path) -> None:
    beside = {"tokenizer.json": "{}", "chat_template.jinja": "{{ messages }}", "generation_config.json": '{"top_k": 3}'}
    for name, text in beside.items():
        (source.parent / name).write_text(text)
    (source.parent / "optimizer.bin").write_text("stays")
    convert(source, tmp_path / "target")
    files = content(tmp_path / "target")
    assert files.keys() == {"config.json", "model.safetensors", *beside}
    assert all(files[name].decode() == text for name, text in beside.items())


def test_a_vocabulary_of_tokens_without_a_tokenizer_is_not_called_bytes(tmp_path: Path) -> None:
    config = BDHConfig(n_layer=1, n_embd=4, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=300)
    convert(formats.trainer(tmp_path, config, random_state(config)), tmp_path / "target")
    assert not (tmp_path / "target" / "tokenizer_config.json").exists()


def test_what_is_there_is_replaced_only_when_asked_and_only_if_it_is_a_model(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.mkdir()
    convert(source, target)  # an empty folder is as good as none
    before = content(target)
    with pytest.raises(CheckpointError, match="--force"):
        convert(source, target)
    (target / "chat_template.jinja").write_text("old")
    convert(source, target, force=True)
    assert content(target) == before
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match=r"thesis\.tex"):
        convert(source, target, force=True)
    assert content(target).keys() == before.keys() | {"thesis.tex"}
    with pytest.raises(CheckpointError, match="where the source lies"):
        convert(source, source.parent, force=True)
    with pytest.raises(CheckpointError, match="is a file"):
        convert(source, source)


@pytest.mark.parametrize("there", [False, True])
def test_a_failure_leaves_nothing_half_made(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    target = tmp_path / "place" / "target"
    if there:
        convert(source, target)
    before = content(target) if there else {}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(convert_module, "save_file", full)
        with pytest.raises(CheckpointError, match=r"target: cannot be written .*No space left"):
            convert(source, target, force=True)
    assert (content(target) if target.exists() else {}) == before
    rename = os.rename

    def refuse_the_new(old: Path, new: Path) -> None:
        if Path(old).name == "new":
            raise OSError(1, "Operation not permitted")
        rename(old, new)

    monkeypatch.setattr(os, "rename", refuse_the_new)
    with pytest.raises(CheckpointError, match="not permitted"):
        convert(source, target, force=True)
    assert (content(target) if target.exists() else {}) == before
    assert [path.name for path in target.parent.iterdir()] == (["target"] if there else [])


def test_what_cannot_be_served_is_not_converted(tmp_path: Path) -> None:
    state = formats.with_freqs(CONFIG, random_state(CONFIG))
    with pytest.raises(CheckpointError, match="--layers"):
        convert(formats.save(tmp_path, state), tmp_path / "target")
    state["decoder"][1, 2] = torch.nan
    with pytest.raises(CheckpointError, match="decoder has 1 numbers of 64 that are NaN"):
        convert(formats.save(tmp_path, state), tmp_path / "target", given=Given(layers=2))
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"]
)
@pytest.mark.parametrize("leads_to", ["secret", "nowhere", "."])
def test_a_link_that_leads_out_of_the_folder_is_not_followed(
    source: Path, tmp_path: Path, name: str, leads_to: str
) -> None:
    (tmp_path / "secret").write_text("{}")
    (source.parent / name).symlink_to(tmp_path / leads_to)
    with pytest.raises(
        CheckpointError, match=rf"{name}: leads to .*{leads_to}, which is not a regular file in its folder"
    ):
        convert(source, tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_a_link_inside_the_folder_is_a_file_of_it(source: Path, tmp_path: Path) -> None:
    (source.parent / "llama.jinja").write_text("{{ messages }}")
    (source.parent / "chat_template.jinja").symlink_to("llama.jinja")
    convert(source, tmp_path / "target")
    assert not (tmp_path / "target" / "chat_template.jinja").is_symlink()
    assert (tmp_path / "target" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_a_snapshot_in_hugging_faces_cache_is_made_of_links(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    formats.native(blobs, CONFIG, random_state(CONFIG))
    for file in list(blobs.iterdir()):
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    convert(snapshot, tmp_path / "target")
    assert content(tmp_path / "target") == content(blobs)


def test_a_pipe_is_no_tokenizer(source: Path, tmp_path: Path) -> None:
    os.mkfifo(source.parent / "tokenizer.json")
    with pytest.raises(CheckpointError, match="not a regular file"):
        convert(source, tmp_path / "target")


@pytest.mark.parametrize("there", [True, False])
def test_a_target_that_is_a_link_is_refused(source: Path, tmp_path: Path, there: bool) -> None:
    if there:
        (tmp_path / "elsewhere").mkdir()
    (tmp_path / "target").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="target: is a link"):
        convert(source, tmp_path / "target", force=True)
