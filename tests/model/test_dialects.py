"""The same model in every file that people have it in: it loads, and converts, without a bit's difference."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from bdh_batch.checkpoint.checkpoint import fingerprint, load_model, open_checkpoint
from bdh_batch.checkpoint.config import BDHConfig, Given, rope_frequencies
from bdh_batch.checkpoint.convert import convert
from bdh_batch.errors import CheckpointError
from tests.model import formats
from tests.model.formats import CPU, expected_weights, hugging_face, logits, random_state, with_freqs

CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small are computed in a millisecond by one thread, and in hundred by several on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@st.composite
def configs(draw: st.DrawFn) -> BDHConfig:
    heads = draw(st.sampled_from([1, 2, 3]))
    return BDHConfig(
        n_layer=draw(st.integers(1, 4)),
        n_embd=draw(st.integers(1, 5)),
        n_head=heads,
        mlp_internal_dim_multiplier=2 * heads * draw(st.integers(1, 3)),
        vocab_size=draw(st.sampled_from([1, 7, 256])),
    )


@pytest.mark.parametrize("write", formats.ALL)
@settings(deadline=None, max_examples=6)
@given(config=configs(), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 2**32))
def test_every_format_loads_and_converts_to_the_same_model(
    write: formats.Writer, config: BDHConfig, dtype: torch.dtype, seed: int
) -> None:
    state = random_state(config, seed, dtype)
    expected = logits(expected_weights(config, state), config)
    with tempfile.TemporaryDirectory() as scratch:
        source, target = Path(scratch) / "source", Path(scratch) / "target"
        source.mkdir()
        path = write(source, config, state)
        for folder in (path, target):
            model = load_model(folder, torch.float32, CPU)
            assert model.config.shapes() == config.shapes()
            assert model.config.n_layer == config.n_layer
            assert torch.equal(logits(model.weights, model.config), expected)
            if folder == path:
                convert(path, target)
        assert {tensor.dtype for key, tensor in load_file(target / "model.safetensors").items() if key in state} == {
            dtype
        }


def save_hf(folder: Path, values: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Path:
    (folder / "config.json").write_text(json.dumps(values))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("more", [{}, {"tie_word_embeddings": True}])
def test_a_head_that_is_not_there_is_the_embedding(tmp_path: Path, more: dict[str, Any]) -> None:
    values, tensors = hugging_face(CONFIG, random_state(CONFIG), **more)
    del tensors["lm_head.weight"]
    weights = load_model(save_hf(tmp_path, values, tensors), torch.float32, CPU).weights
    assert torch.equal(weights.lm_head, weights.embed.mT)
    assert weights.lm_head.is_contiguous()


def test_a_head_is_only_missing_where_nothing_ties_it(tmp_path: Path) -> None:
    state = random_state(CONFIG)
    del state["lm_head"]
    with pytest.raises(CheckpointError, match=r"missing lm_head \[8, 11\]"):
        open_checkpoint(formats.save(tmp_path, state), given=Given(layers=3))
    values, tensors = hugging_face(CONFIG, random_state(CONFIG), tie_word_embeddings=False)
    del tensors["lm_head.weight"]
    with pytest.raises(CheckpointError, match=r"missing lm_head \[8, 11\]"):
        open_checkpoint(save_hf(tmp_path, values, tensors))


def test_a_tied_head_that_is_another_is_refused(tmp_path: Path) -> None:
    values, tensors = hugging_face(CONFIG, random_state(CONFIG), tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match="set tie_word_embeddings to false"):
        open_checkpoint(save_hf(tmp_path, values, tensors))
    tensors["lm_head.weight"] = tensors["backbone.embed.weight"].clone()
    assert open_checkpoint(save_hf(tmp_path, values, tensors)).config.n_layer == 3


def test_what_a_model_is_best_at_comes_along(tmp_path: Path) -> None:
    trained = open_checkpoint(formats.trainer(tmp_path, CONFIG, random_state(CONFIG))).config
    assert trained.trained_context == 128
    values, tensors = hugging_face(CONFIG, random_state(CONFIG), sliding_window=64)
    assert open_checkpoint(save_hf(tmp_path, values, tensors)).config.attention_window == 64


@pytest.mark.parametrize("write", [formats.shared_by_layer, formats.modules_by_layer])
def test_layers_may_have_weights_of_their_own(tmp_path: Path, write: formats.Writer) -> None:
    path = write(tmp_path, CONFIG, random_state(CONFIG))
    state = torch.load(path)
    torch.save({key: tensor + ("1" in key and "v" in key) for key, tensor in state.items()}, path)
    convert(path, tmp_path / "native")
    for each in (path, tmp_path / "native"):
        model = load_model(each, torch.float32, CPU)
        assert model.config.per_layer_weights
        for name in ("encoder", "encoder_v", "decoder"):
            sets, shared = getattr(model.weights, name), random_state(CONFIG)[name]
            assert torch.equal(sets, torch.stack([shared, shared + (name == "encoder_v"), shared]))


@pytest.mark.parametrize("said", [{}, {"per_layer_weights": True}, {"per_layer_weights": False}])
def test_copies_for_each_layer_are_shared_unless_the_config_says_otherwise(
    tmp_path: Path, said: dict[str, Any]
) -> None:
    path = formats.shared_by_layer(tmp_path, CONFIG, random_state(CONFIG))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict() | said))
    sets = 3 if said.get("per_layer_weights") else 1
    assert len(load_model(path, torch.float32, CPU).weights.encoder) == sets
    if said == {"per_layer_weights": False}:
        state = torch.load(path)
        torch.save(state | {"decoder.2": state["decoder.2"] + 1}, path)
        with pytest.raises(CheckpointError, match="per_layer_weights: its config says False, its keys say True"):
            open_checkpoint(path)


VARIANTS = [
    {"norm": "final"},
    {"rope_theta": 10_000.0, "rope_layout": "half"},
    {"rope_theta": 10_000.0, "rope_layout": "half", "rotary_dim": 6, "norm": "final", "per_layer_weights": True},
    {"rope_theta": 300.5, "rotary_dim": 4, "latent_steps": True, "head_neurons": 10},
    {"rotary_dim": 0, "trained_context": 99},
]


@pytest.mark.parametrize("fields", VARIANTS)
def test_every_field_comes_back_from_a_native_folder(tmp_path: Path, fields: dict[str, Any]) -> None:
    config = replace(CONFIG, **fields)
    state = random_state(config)
    if config.latent_steps:
        state["latent_step_embed"] = torch.randn(8)
    formats.native(tmp_path / "saved", config, state)
    convert(tmp_path / "saved", tmp_path / "converted")
    saved, converted = (load_model(tmp_path / name, torch.float32, CPU) for name in ("saved", "converted"))
    for model in (saved, converted):
        assert model.config.to_dict() == config.to_dict()
        assert model.weights.final_norm == (config.norm == "final")
        assert model.weights.encoder.shape == (3 if config.per_layer_weights else 1, 2, 8, config.neurons_per_head)
    assert fingerprint(saved.weights) == fingerprint(converted.weights)
    assert load_file(tmp_path / "converted" / "model.safetensors").keys() == {"attn.freqs", *state}


def test_every_field_changes_the_fingerprint(tmp_path: Path) -> None:
    """Which tells whose states are whose."""
    found = set()
    for fields in ({}, {"norm": "final"}, {"rope_theta": 300.0}, {"rope_layout": "half"}, {"rotary_dim": 4}):
        config = replace(CONFIG, **fields)
        weights = load_model(formats.native(tmp_path, config, random_state(config)), torch.float32, CPU).weights
        found.add(fingerprint(weights))
    assert len(found) == 5


class TestGiven:
    """What the settings say of a model fills what its file leaves open."""

    def test_it_counts_where_nobody_says_it(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
        path = formats.save(tmp_path, random_state(CONFIG))
        given = Given(norm="final", rope_layout="half", rope_theta=500.0, rotary_dim=4)
        model = load_model(path, torch.float32, CPU, given)
        assert model.weights.final_norm
        assert model.neuron_order is not None
        assert model.neuron_order.tolist()[:6] == [0, 2, 1, 3, 4, 5]
        assert torch.allclose(
            model.weights.frequencies[:6] * 2 * torch.pi, torch.tensor([1, 1, 500**-0.5, 500**-0.5, 0, 0])
        )

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (Given(layers=4), "n_layer: its config says 3, model.layers says 4"),
            (Given(norm="final"), "norm: its config says 'every_layer', model.norm says 'final'"),
            (Given(rope_layout="half"), "rope_layout: its config says 'interleaved', model.rope_layout says 'half'"),
            (Given(rope_theta=1e4), "rope_theta: its config says 65536.0, model.rope_theta says 10000.0"),
            (Given(rotary_dim=2), "attn.freqs should be 0 from neuron 2 on (rotary_dim)"),
        ],
    )
    def test_it_may_not_contradict_the_file(self, tmp_path: Path, given: Given, message: str) -> None:
        formats.native(tmp_path, CONFIG, random_state(CONFIG))
        with pytest.raises(CheckpointError, match=re.escape(message)):
            open_checkpoint(tmp_path, given)
        assert open_checkpoint(tmp_path, Given(3, "every_layer", "interleaved", 2.0**16, 16)).config.n_layer == 3

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (Given(rotary_dim=7), "rotary_dim must be an even number of at most 16, the neurons of a head, not 7"),
            (Given(rope_theta=1e31), "rope_theta must be a number from 1 to 1e+30, not 1e+31"),
        ],
    )
    def test_what_cannot_be_names_the_option(self, tmp_path: Path, given: Given, message: str) -> None:
        path = formats.save(tmp_path, random_state(CONFIG))
        (option,) = (option for option, _ in given.fields().values())
        with pytest.raises(CheckpointError, match=re.escape(f"{message} (with {option})")):
            open_checkpoint(path, given)


def test_the_half_layout_is_a_permutation_of_the_neurons(tmp_path: Path) -> None:
    """RoPE turns neighbours; the checkpoint's numbers of neurons are kept."""
    config = replace(CONFIG, rope_layout="half", rotary_dim=6)
    state = random_state(config)
    model = load_model(formats.native(tmp_path, config, state), torch.float32, CPU)
    order = model.neuron_order
    assert order is not None
    assert order.tolist() == [0, 3, 1, 4, 2, 5, *range(6, 16)]
    assert torch.equal(model.weights.encoder[0], state["encoder"][..., order])
    assert torch.equal(model.weights.encoder_v[0], state["encoder_v"][..., order])
    assert torch.equal(model.weights.decoder[0].view(2, 16, 8), state["decoder"].view(2, 16, 8)[:, order])
    assert torch.equal(model.weights.frequencies, config.frequencies()[order])


def test_other_frequencies_are_served_as_they_are(tmp_path: Path) -> None:
    halved = rope_frequencies(16) / 2
    path = formats.save(tmp_path, {"model": random_state(CONFIG) | {"attn.freqs": halved.view(1, 1, 1, -1)}})
    convert(path, tmp_path / "native", given=Given(layers=3))
    for folder in (path, tmp_path / "native"):
        weights = load_model(folder, torch.bfloat16, CPU, given=Given(layers=3)).weights
        assert torch.equal(weights.frequencies, halved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_lost_their_phases_are_computed_anew(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in with_freqs(CONFIG, random_state(CONFIG)).items()}
    model = load_model(formats.save(tmp_path, state), torch.float32, CPU, given=Given(layers=3))
    assert torch.equal(model.weights.frequencies, rope_frequencies(16))
    state["attn.freqs"] = state["attn.freqs"] / 2
    with pytest.raises(CheckpointError, match=r"attn\.freqs.*save it in float32"):
        open_checkpoint(formats.save(tmp_path, state))


def test_without_frequencies_the_config_has_to_say_what_rope_is(tmp_path: Path) -> None:
    sizes = formats.upstream_config(CONFIG)
    path = formats.save(tmp_path, random_state(CONFIG))
    for values in (None, sizes):
        if values is not None:
            (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r'missing attn\.freqs \[1, 1, 1, 16\].*"rope_theta": 65536'):
            open_checkpoint(path, given=Given(layers=3))
    for stated in ({"rope_theta": 65536}, {"rope_theta": 65536.0}, {"trained_context": 128}, {"model_type": "bdh"}):
        (tmp_path / "config.json").write_text(json.dumps(sizes | stated))
        assert torch.equal(open_checkpoint(path).frequencies(), rope_frequencies(16))


def test_a_file_without_a_config_says_what_rope_is_by_its_frequencies(tmp_path: Path) -> None:
    assert (
        open_checkpoint(formats.save(tmp_path, with_freqs(CONFIG, random_state(CONFIG))), given=Given(layers=3)).config
        == CONFIG
    )


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "_fsdp_wrapped_module.module."])
def test_what_wraps_a_model_may_stand_before_its_names(tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + key: tensor for key, tensor in with_freqs(CONFIG, random_state(CONFIG)).items()}
    for saved in (tensors, {"state_dict": tensors}, {"model": tensors}):
        assert open_checkpoint(formats.save(tmp_path, saved), given=Given(layers=3)).config == CONFIG


class Test16Bits:
    def test_numbers_that_do_not_fit_are_counted(self, tmp_path: Path) -> None:
        state = random_state(CONFIG)
        state["encoder"][0, 0, :3] = 1e6
        path = formats.native(tmp_path, CONFIG, state)
        assert load_model(path, torch.bfloat16, CPU).config == CONFIG
        with pytest.raises(CheckpointError, match=r"encoder has 3 numbers of 256 .* in float16"):
            load_model(path, torch.float16, CPU)
