"""The same model in every file that people have it in: it loads, and converts, without a bit's difference."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from bdh_batch.checkpoint.checkpoint import load_model, open_checkpoint
from bdh_batch.checkpoint.config import BDHConfig, rope_frequencies
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
        open_checkpoint(formats.save(tmp_path, state), layers=3)
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
def test_layers_with_weights_of_their_own_are_refused_with_the_remedy(tmp_path: Path, write: formats.Writer) -> None:
    path = write(tmp_path, CONFIG, random_state(CONFIG))
    state = torch.load(path)
    torch.save({key: tensor + ("1" in key and "v" in key) for key, tensor in state.items()}, path)
    with pytest.raises(CheckpointError, match=r"encoder_v.*train it with shared weights") as error:
        open_checkpoint(path)
    assert "decoder" not in error.value.message


def test_other_frequencies_are_served_as_they_are(tmp_path: Path) -> None:
    halved = rope_frequencies(16) / 2
    path = formats.save(tmp_path, {"model": random_state(CONFIG) | {"attn.freqs": halved.view(1, 1, 1, -1)}})
    convert(path, tmp_path / "native", layers=3)
    for folder in (path, tmp_path / "native"):
        weights = load_model(folder, torch.bfloat16, CPU, layers=3).weights
        assert torch.equal(weights.frequencies, halved)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_frequencies_that_lost_their_phases_are_computed_anew(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {key: tensor.to(dtype) for key, tensor in with_freqs(CONFIG, random_state(CONFIG)).items()}
    model = load_model(formats.save(tmp_path, state), torch.float32, CPU, layers=3)
    assert torch.equal(model.weights.frequencies, rope_frequencies(16))
    state["attn.freqs"] = state["attn.freqs"] / 2
    with pytest.raises(CheckpointError, match=r"attn\.freqs.*save it in float32"):
        open_checkpoint(formats.save(tmp_path, state))


def test_the_papers_names_are_refused_with_what_they_leave_open(tmp_path: Path) -> None:
    """Public models of these names and of the same sizes are other functions than upstream's."""
    path = formats.paper(tmp_path, CONFIG, with_freqs(CONFIG, random_state(CONFIG)))
    with pytest.raises(
        CheckpointError, match=r"decoder_x, decoder_y, readout, wte\.weight.*LayerNorm.*RoPE's base"
    ) as error:
        open_checkpoint(path)
    assert "decoder_x is encoder" in error.value.message


def test_without_frequencies_the_config_has_to_say_what_rope_is(tmp_path: Path) -> None:
    sizes = formats.upstream_config(CONFIG)
    path = formats.save(tmp_path, random_state(CONFIG))
    for values in (None, sizes):
        if values is not None:
            (tmp_path / "config.json").write_text(json.dumps(values))
        with pytest.raises(CheckpointError, match=r'missing attn\.freqs \[1, 1, 1, 16\].*"rope_theta": 65536'):
            open_checkpoint(path, layers=3)
    for stated in ({"rope_theta": 65536}, {"rope_theta": 65536.0}, {"trained_context": 128}, {"model_type": "bdh"}):
        (tmp_path / "config.json").write_text(json.dumps(sizes | stated))
        assert torch.equal(open_checkpoint(path).frequencies(), rope_frequencies(16))


def test_a_file_without_a_config_says_what_rope_is_by_its_frequencies(tmp_path: Path) -> None:
    assert open_checkpoint(formats.save(tmp_path, with_freqs(CONFIG, random_state(CONFIG))), layers=3).config == CONFIG


@pytest.mark.parametrize("prefix", ["model.", "model._orig_mod.", "_fsdp_wrapped_module.module."])
def test_what_wraps_a_model_may_stand_before_its_names(tmp_path: Path, prefix: str) -> None:
    tensors = {prefix + key: tensor for key, tensor in with_freqs(CONFIG, random_state(CONFIG)).items()}
    for saved in (tensors, {"state_dict": tensors}, {"model": tensors}):
        assert open_checkpoint(formats.save(tmp_path, saved), layers=3).config == CONFIG


class Test16Bits:
    def test_numbers_that_do_not_fit_are_counted(self, tmp_path: Path) -> None:
        state = random_state(CONFIG)
        state["encoder"][0, 0, :3] = 1e6
        path = formats.native(tmp_path, CONFIG, state)
        assert load_model(path, torch.bfloat16, CPU).config == CONFIG
        with pytest.raises(CheckpointError, match=r"encoder has 3 numbers of 256 .* in float16"):
            load_model(path, torch.float16, CPU)
