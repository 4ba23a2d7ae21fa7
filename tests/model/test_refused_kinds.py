"""What is not known to be computed right is refused by what it is, in one line that names the file and what to do."""

from __future__ import annotations

import argparse
import json
import os
import tracemalloc
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from bdh_cq import BDH, BDHReasoningWrapper, HigherOrderBDHLayer
from torch import Tensor

from bdh_batch.checkpoint import npz
from bdh_batch.checkpoint.checkpoint import load_model, open_checkpoint
from bdh_batch.checkpoint.config import NOTHING, BDHConfig, Given
from bdh_batch.checkpoint.convert import convert
from bdh_batch.engine.loading import given_by
from bdh_batch.errors import CheckpointError
from bdh_batch.processes.model_settings import models_of
from bdh_batch.settings import Settings
from bdh_batch.text.folder import load_text
from tests.model import formats
from tests.model.formats import CPU, random_state, save, upstream_config, with_freqs

CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)
CQ = {"dim": 8, "num_tokens": 11, "depth": 3, "heads": 2, "dim_qk_heads": 32, "rotary_dim": 4}
PAPER = {
    **{"embed.weight": "wte.weight", "encoder": "decoder_x", "encoder_v": "decoder_y", "decoder": "encoder"},
    "lm_head": "readout",
}
State = dict[str, Tensor]


def refusal(path: Path, given: Given = NOTHING) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(path, torch.float32, CPU, given)
    message = error.value.message
    assert message.isprintable(), message
    assert message.startswith(str(path.parent))
    return message


def with_config(folder: Path, values: dict[str, Any], saved: object) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    return save(folder, saved)


def upstream() -> State:
    return dict(with_freqs(CONFIG, random_state(CONFIG)))


def paper() -> State:
    return {PAPER[key]: tensor for key, tensor in random_state(CONFIG).items()}


def cq(**options: Any) -> State:
    return dict(BDH(**CQ, **options).state_dict())


EMPTY = torch.zeros(2, 2)
INEXPRESSIBLE: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "E, Dx, Dy in their wrapper": (lambda: {"bdh_state_dict": {"E": EMPTY}, "bdh_params_dict": {}}, "E, Dx and Dy"),
    "E, Dx, Dy": (lambda: {"model": {"module.E": EMPTY, "module.Dx": EMPTY, "module.Dy": EMPTY}}, "E, Dx and Dy"),
    "a mask": (lambda: upstream() | {"mask_encoder": EMPTY}, "a learnt mask of its neurons (mask_encoder)"),
    "gates": (lambda: upstream() | {"core.forget_gate.weight": EMPTY}, "forgets by gates or by decay (forget_gate"),
    "gates of layers": (lambda: upstream() | {"layers.0.forget.bias": EMPTY}, "forgets by gates or by decay"),
    "differential": (lambda: upstream() | {"attn.lambda_q1": EMPTY}, "differential attention (attn.lambda_q1)"),
    "triadic": (lambda: cq(triadic=True), "a bdh-cq with triadic attention (block.to_qk2.weight)"),
    "residuals": (lambda: cq(attn_residual=True), "a bdh-cq with attention residuals (attn_residual."),
    "of higher order": (lambda: cq(block_cls=HigherOrderBDHLayer), "a bdh-cq with attention of higher order"),
}


@pytest.mark.parametrize("kind", INEXPRESSIBLE)
def test_other_functions_are_refused_by_what_they_are(kind: str, tmp_path: Path) -> None:
    make, text = INEXPRESSIBLE[kind]
    message = refusal(save(tmp_path, make()))
    assert text in message
    assert "not computed here" in message
    assert "missing" not in message


@pytest.mark.parametrize("name", ["model.bpk", "model.pt", "folder"])
def test_burnpacks_are_refused_by_what_they_are(name: str, tmp_path: Path) -> None:
    file = tmp_path / ("model.bpk" if name == "folder" else name)
    file.write_bytes(b"NRUB\1\0\0\0\0\0")
    with pytest.raises(CheckpointError, match=r"model\.(bpk|pt) is a Burnpack.*export it as safetensors"):
        open_checkpoint(tmp_path if name == "folder" else file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("attn_window", 64), ("latent_token_id", 7), ("forget_mode", "data"), ("u_decay", 0.99), ("u_decay", True)],
        *[("triadic", True), ("attn_residual", True), ("attn_residual_depth_bias_distance", 2), ("forget_mode", [])],
    ],
)
def test_a_variants_field_is_refused_by_name_and_value(field: str, value: Any, tmp_path: Path) -> None:
    path = with_config(tmp_path, upstream_config(CONFIG) | {field: value}, upstream())
    message = refusal(path)
    assert "config.json" in message
    assert f"{field} is {value!r}, a variant that is not computed here; only" in message


class TestPapersNames:
    """They do not tell RoPE or where norms are."""

    SIZES: ClassVar = {"L": 3, "D": 8, "H": 2, "N": 32, "vocab_size": 11}

    @pytest.mark.parametrize(
        "given", [NOTHING, Given(norm="final"), Given(rope_layout="half"), Given(rope_theta=10_000.0, rotary_dim=8)]
    )
    @pytest.mark.parametrize("more", [{}, {"attn.freqs": CONFIG.frequencies()}])
    def test_both_settings_have_to_be_given(self, given: Given, more: State, tmp_path: Path) -> None:
        message = refusal(with_config(tmp_path, self.SIZES, paper() | more), given)
        assert "Give model.norm and model.rope_layout" in message
        assert "the paper's listing (decoder_x, decoder_y, readout, wte.weight)" in message
        if given == NOTHING and more:
            (tmp_path / "config.json").unlink()
            assert "Give model.norm and model.rope_layout" in refusal(tmp_path / "model.pt", Given(layers=3))

    def test_frequencies_in_the_file_have_to_be_those(self, tmp_path: Path) -> None:
        path = with_config(tmp_path, self.SIZES, paper() | {"freqs": CONFIG.frequencies()})
        assert "for neurons i and i + 8 (rope_layout half)" in refusal(path, Given(norm="final", rope_layout="half"))
        given = Given(norm="final", rope_layout="interleaved")
        assert open_checkpoint(path, given).config.norm == "final"
        assert "freqs (attn.freqs) is not of rope_theta 10000" in refusal(path, replace(given, rope_theta=1e4))

    def test_the_settings_may_not_contradict_the_config(self, tmp_path: Path) -> None:
        path = with_config(tmp_path, self.SIZES | {"norm": "final", "rope_layout": "half"}, paper())
        assert open_checkpoint(path).config.rope_theta == 10_000
        message = refusal(path, Given(norm="every_layer"))
        assert "norm: its config says 'final', model.norm says 'every_layer'" in message
        message = refusal(path, Given(rope_layout="interleaved"))
        assert "rope_layout: its config says 'half', model.rope_layout says 'interleaved'" in message


class TestCq:
    @pytest.mark.parametrize(
        ("change", "config", "given", "text"),
        [
            ({}, {"depth": None}, NOTHING, "give model.layers, or depth in its config.json"),
            ({}, {}, Given(layers=4), "n_layer: its config says 3, model.layers says 4"),
            ({}, {}, Given(norm="every_layer"), "norm: its keys say 'final', model.norm says 'every_layer'"),
            ({}, {}, Given(rotary_dim=8), "rotary_dim: its config says 4, model.rotary_dim says 8"),
            ({}, {"rotary_dim": 0}, NOTHING, "rotary_dim: its config says 0, its keys say 4"),
            ({}, {"rotary_dim": 6}, NOTHING, "rotary_dim: its config says 6, its keys say 4"),
            ({}, {"rope_theta": 500}, NOTHING, "rope_theta: its config says 500, its keys say 10000.0"),
            ({"rope.freqs": None}, {}, NOTHING, "missing rope.freqs [rotary_dim / 2]"),
            ({"rope.freqs": None}, {"rotary_dim": None}, NOTHING, "missing rope.freqs [rotary_dim / 2]"),
            ({"rope.freqs": None}, {"attention_window": 64}, NOTHING, "missing rope.freqs [rotary_dim / 2]"),
            ({"rope.freqs": None}, {"model_type": "bdh"}, NOTHING, "missing rope.freqs [rotary_dim / 2]"),
            ({"rope.freqs": torch.ones(2, dtype=torch.int32)}, {}, NOTHING, "rope.freqs has 2 elements of int32"),
            ({"rope.freqs": torch.full((2,), torch.nan)}, {}, NOTHING, "rope.freqs (attn.freqs) should be finite"),
            (
                {},
                {"dim_qk_heads": 64},
                NOTHING,
                "dim_qk_heads in its config is 64 (of all heads), and its 2 heads have 16",
            ),
            ({}, {"dim_qk_heads": "64"}, NOTHING, "dim_qk_heads must be a positive integer"),
            ({}, {"dim": 16}, NOTHING, "token_embed.weight (embed.weight) has shape [11, 8], not [11, 16]"),
            ({}, {"latent_step_embed": True}, NOTHING, "latent_step_embed is missing"),
            (
                {"latent_step_embed": torch.zeros(8)},
                {"latent_step_embed": False},
                NOTHING,
                "latent_step_embed is there",
            ),
            ({"latent_step_embed": torch.zeros(9)}, {}, NOTHING, "latent_step_embed should be floats of the shape [8]"),
            (
                {"block.to_qk.weight": torch.zeros(8, 32)},
                {},
                NOTHING,
                "block.to_qk.weight has shape [8, 32], not [32, 8]",
            ),
            ({"block.proj_up": torch.zeros(8, 32)}, {}, NOTHING, "block.proj_up should be [heads, D, N], is [8, 32]"),
            ({"block.proj_out.weight": None}, {}, NOTHING, "missing block.proj_out.weight (decoder) [32, 8]"),
            ({"to_logits.weight": torch.zeros(3, 8)}, {}, NOTHING, "to_logits.weight has shape [3, 8], not [11, 8]"),
            ({"stranger": torch.zeros(3)}, {}, NOTHING, "extra stranger"),
        ],
    )
    def test_what_does_not_go_together_is_refused(
        self, change: dict[str, Any], config: dict[str, Any], given: Given, text: str, tmp_path: Path
    ) -> None:
        state = {key: tensor for key, tensor in (cq() | change).items() if tensor is not None}
        values = {name: value for name, value in (CQ | config).items() if value is not None}
        assert text in refusal(with_config(tmp_path, values, state), given)

    def test_a_config_is_for_tensors_of_its_kind(self, tmp_path: Path) -> None:
        message = refusal(with_config(tmp_path, upstream_config(CONFIG), cq()))
        assert "holds the tensors of a bdh-cq" in message
        assert "mlp_internal_dim_multiplier, n_embd, n_head, n_layer" in message
        message = refusal(with_config(tmp_path, CQ, upstream()))
        assert "does not hold those of a bdh-cq" in message
        assert "depth, dim, dim_qk_heads, heads, num_tokens" in message
        path = with_config(tmp_path, {"model_type": "bdh-cq"} | upstream_config(CONFIG), upstream())
        assert "its config is that of a bdh-cq (bdh-cq)" in refusal(path)

    def test_the_wrapper_brings_the_embedding_of_latent_steps(self, tmp_path: Path) -> None:
        wrapper = BDHReasoningWrapper(BDH(**CQ), latent_step_embed=True)
        path = save(tmp_path, wrapper.state_dict())
        assert open_checkpoint(path, Given(layers=3)).config.latent_steps
        message = refusal(
            with_config(tmp_path, upstream_config(CONFIG), upstream() | {"latent_step_embed": torch.ones(8)})
        )
        assert "latent_step_embed is there, and latent_steps is not true in its config" in message


@dataclass
class TrainConfig:
    n_layer: int = 3
    n_embd: int = 8
    n_head: int = 2
    mlp_internal_dim_multiplier: int = 4
    block_size: int = 64


class Runs:
    """Runs code when it is unpickled, were it allowed to."""

    def __init__(self, *call: Any) -> None:
        self.call = call

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call[0], self.call[1:]


def touch(name: str) -> None:
    Path(name).touch()


class TestPickledConfigs:
    """Fields are read of an object, and nothing is run."""

    FIELDS: ClassVar = {"n_layer": 3, "n_embd": 8, "n_head": 2, "mlp_internal_dim_multiplier": 4, "block_size": 64}

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("make", [TrainConfig, SimpleNamespace, argparse.Namespace])
    @pytest.mark.parametrize("key", ["config", "model_args"])
    def test_plain_fields_are_read(self, make: Callable[..., Any], key: str, zipped: bool, tmp_path: Path) -> None:
        saved = {"model": upstream(), key: make(**self.FIELDS)}
        config = open_checkpoint(save(tmp_path, saved, _use_new_zipfile_serialization=zipped)).config
        assert config == replace(CONFIG, trained_context=64)

    @pytest.mark.parametrize(
        "saved",
        [
            {"config": Runs(touch, "owned")},
            {"config": Runs(os.system, "touch owned")},
            {"config": Runs(exec, "open('owned', 'w')")},
            {"config": SimpleNamespace(n_layer=3, made=Runs(touch, "owned"))},
            {"config": SimpleNamespace(n_layer=3, nested=SimpleNamespace(n_head=2))},
            {"config": SimpleNamespace(n_layer=3), "history": [SimpleNamespace(loss=1)]},
            {"config": {"n_layer": 3}, "trainer": TrainConfig()},
            {"config": SimpleNamespace()},
            {"config": TrainConfig},
        ],
    )
    def test_other_objects_are_refused_with_the_two_lines_that_convert_them(
        self, saved: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        message = refusal(save(tmp_path, {"model": upstream()} | saved))
        assert 'saved = torch.load("model.pt", weights_only=False); torch.save({"model": saved["model"]' in message
        assert not (tmp_path / "owned").exists()

    def test_the_two_lines_convert_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        file = save(tmp_path, {"model": upstream(), "config": TrainConfig(), "history": [SimpleNamespace(loss=1)]})
        message = refusal(file)
        lines = message[message.index("saved = ") : message.rindex(" (dataclasses")]
        exec(lines, {"torch": torch})
        assert open_checkpoint(file).config.n_layer == 3


class TestNpz:
    def arrays(self) -> dict[str, Any]:
        return {key: tensor.numpy() for key, tensor in upstream().items()}

    def refused(self, folder: Path, packed: bool = False, **arrays: Any) -> str:
        (np.savez_compressed if packed else np.savez)(folder / "model.npz", **(self.arrays() | arrays))
        return refusal(folder / "model.npz", Given(layers=3))

    def test_objects_are_not_loaded(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        array = np.array([Runs(touch, "owned")], dtype=object)
        assert "config is an array of Python objects" in self.refused(tmp_path, config=array)
        assert not (tmp_path / "owned").exists()

    def test_a_bomb_is_not_unpacked(self, tmp_path: Path) -> None:
        tracemalloc.start()
        np.savez_compressed(tmp_path / "model.npz", encoder=np.zeros((2, 8, 2**21), np.float32))
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        message = refusal(tmp_path / "model.npz", Given(layers=3))
        assert tracemalloc.get_traced_memory()[1] - before < 2**22
        tracemalloc.stop()
        assert "unpacks to 134,217," in message
        assert "more than 32 times its own" in message

    def test_what_does_not_fit_the_memory_is_not_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(npz, "available_memory", lambda: 1000)
        assert "and 1,000 are free" in self.refused(tmp_path)

    @pytest.mark.parametrize(
        ("arrays", "text"),
        [
            ({"encoder": np.zeros((2, 8, 14), np.float32)}, "encoder_v has shape [2, 8, 16], not [2, 8, 14]"),
            ({"stranger": np.zeros(3)}, "extra stranger"),
            ({"decoder": np.zeros((32, 8), np.complex64)}, "decoder holds complex64, not numbers"),
            ({"decoder": np.zeros((32, 8), np.int64)}, "decoder holds int64, not floats"),
            ({"note": np.array("a text")}, "note holds"),
            ({"step": np.zeros(3)}, "extra step"),
        ],
    )
    def test_what_is_no_model_is_refused_by_its_keys(self, arrays: dict[str, Any], text: str, tmp_path: Path) -> None:
        assert text in self.refused(tmp_path, **arrays)

    def test_numbers_of_another_machine_are_read(self, tmp_path: Path) -> None:
        state = random_state(CONFIG)
        arrays = self.arrays() | {"encoder": np.asfortranarray(state["encoder"].numpy().astype(">f4"))}
        np.savez(tmp_path / "model.npz", **arrays)
        weights = load_model(tmp_path / "model.npz", torch.float32, CPU, Given(layers=3)).weights
        assert torch.equal(weights.encoder[0], state["encoder"])

    @pytest.mark.parametrize(
        ("member", "content", "text"),
        [
            ("encoder.npy", b"", "damaged"),
            ("encoder.npy", b"\x93NUMPY\x01\x00\x08\x00garbage\n", "damaged"),
            ("encoder.npy", b"\x93NUMPY\x09\x00\x08\x00garbage\n", "damaged"),
            ("notes.txt", b"hello", "notes.txt, which is no array"),
        ],
    )
    def test_damaged_members_are_refused(self, member: str, content: bytes, text: str, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
            archive.writestr(member, content)
        assert text in refusal(tmp_path / "model.npz")

    def test_a_header_that_claims_more_than_follows_is_refused(self, tmp_path: Path) -> None:
        np.save(tmp_path / "array.npy", np.zeros((2, 8, 16), np.float32))
        content = (tmp_path / "array.npy").read_bytes().replace(b"(2, 8, 16), }", b"(2, 8, 1600)}")
        with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
            archive.writestr("encoder.npy", content)
        assert "encoder claims 102,400 bytes, and 1,024 follow" in refusal(tmp_path / "model.npz")

    @pytest.mark.parametrize("shape", [f"(0, {2**70})", f"({'-' * 9000}1,)"])
    def test_headers_that_their_readers_fail_at_are_refused(self, shape: str, tmp_path: Path) -> None:
        header = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}}}\n".encode()
        with zipfile.ZipFile(tmp_path / "model.npz", "w") as archive:
            archive.writestr("encoder.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)
        assert "damaged, or not an npz file" in refusal(tmp_path / "model.npz")

    @pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
    def test_other_compressions_are_refused_before_anything_is_unpacked(self, method: int, tmp_path: Path) -> None:
        with zipfile.ZipFile(tmp_path / "model.npz", "w", method) as archive:
            archive.writestr("encoder.npy", b"hello")
        content = bytearray((tmp_path / "model.npz").read_bytes())
        content[45] ^= 0xFF  # of the compressed data, which its library would raise an error of its own at
        (tmp_path / "model.npz").write_bytes(content)
        assert "compressed in another way than numpy does it" in refusal(tmp_path / "model.npz")

    def test_what_is_no_zip_is_refused(self, tmp_path: Path) -> None:
        for content in (b"", b"hello", b"PK\x03\x04" + bytes(100)):
            (tmp_path / "model.npz").write_bytes(content)
            assert "damaged, or not an npz file" in refusal(tmp_path / "model.npz")


def test_the_tokenizer_may_have_a_folder(tmp_path: Path) -> None:
    """As trainers leave it: config.json, model.pt and tokenizer/."""
    source = tmp_path / "source"
    (source / "tokenizer").mkdir(parents=True)
    (source / "tokenizer" / "tokenizer_config.json").write_text('{"type": "byte"}')
    (source / "tokenizer" / "chat_template.jinja").write_text("{{ messages }}")
    config = replace(CONFIG, vocab_size=300)
    formats.bare(source, config, random_state(config))
    convert(source, tmp_path / "native")
    for folder in (source, tmp_path / "native"):
        text = load_text(folder)
        assert text.declared
        assert "chat_template.jinja" in text.template.name


def test_the_settings_say_what_the_files_leave_open() -> None:
    said = {"layers": 3, "norm": "final", "rope_layout": "half", "rope_theta": 500.0, "rotary_dim": 4}
    given = Given(3, "final", "half", 500.0, 4)
    assert given_by(Settings.model_validate({"model": said}).model) == given
    (model, other) = models_of(Settings.model_validate({"models": [{"id": "a", **said}, {"id": "b"}]}))
    assert given_by(model.settings.model) == given
    assert given_by(other.settings.model) == NOTHING
