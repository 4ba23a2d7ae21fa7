from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from bdh_batch.checkpoint.checkpoint import load_model, save_model
from bdh_batch.checkpoint.config import BDHConfig, Given, bytes_per_sequence, rope_frequencies
from bdh_batch.engine.state_pool import StatePool, slots_within
from bdh_batch.errors import CheckpointError, ConfigError

CPU = torch.device("cpu")
CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)


def random_state(config: BDHConfig = CONFIG) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(shape, generator=generator) for key, shape in config.shapes().items()}


def upstream_state() -> dict[str, torch.Tensor]:
    freqs = rope_frequencies(CONFIG.neurons_per_head).view(1, 1, 1, -1)
    return OrderedDict(random_state() | {"attn.freqs": freqs})


def load(path: Path, **options: Any) -> BDHConfig:
    model = load_model(path, torch.float32, CPU, **options)
    for key, tensor in random_state().items():
        assert torch.equal(getattr(model.weights, key.removesuffix(".weight")).view_as(tensor), tensor)
    assert torch.equal(model.weights.frequencies, rope_frequencies(CONFIG.neurons_per_head))
    assert model.weights.layers == model.config.n_layer
    return model.config


def test_a_folder_that_was_saved_loads_again(tmp_path: Path) -> None:
    save_model(tmp_path / "m", CONFIG, random_state(), {"temperature": 0.5})
    assert load(tmp_path / "m") == CONFIG
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text()) == {"temperature": 0.5}


@pytest.mark.parametrize("prefix", ["", "_orig_mod."])
def test_an_upstream_state_dict_loads(tmp_path: Path, prefix: str) -> None:
    torch.save({prefix + key: tensor for key, tensor in upstream_state().items()}, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    assert load(tmp_path / "model.pt") == CONFIG
    assert load(tmp_path) == CONFIG


def test_a_bare_state_dict_without_a_config_has_the_layers_that_are_asked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(upstream_state(), tmp_path / "model.pt")
    assert load(tmp_path / "model.pt", given=Given(layers=3)) == BDHConfig(**CONFIG.to_dict())
    assert not caplog.records
    assert load(tmp_path / "model.pt").n_layer == 6
    assert "model.layers" in caplog.text


@pytest.mark.parametrize("key", ["model", "model_state_dict"])
def test_a_trainers_wrapper_loads(tmp_path: Path, key: str) -> None:
    wrapped = {key: upstream_state() | {"lm_gate": torch.zeros(3)}, "config": CONFIG.to_dict(), "step": 7}
    torch.save(wrapped, tmp_path / "checkpoint.pt")
    assert load(tmp_path / "checkpoint.pt") == CONFIG


def test_every_wrong_key_is_listed(tmp_path: Path) -> None:
    state = random_state()
    del state["decoder"]
    state |= {"encoder": torch.zeros(2, 8, 3), "stranger": torch.zeros(1), "other": torch.zeros(1)}
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    with pytest.raises(CheckpointError) as error:
        load(tmp_path)
    for part in (
        "missing decoder [32, 8]",
        "extra other",
        "extra stranger",
        "encoder has shape [2, 8, 3], not [2, 8, 16]",
    ):
        assert part in error.value.message


def test_16_bit_weights_keep_float32_frequencies(tmp_path: Path) -> None:
    save_model(tmp_path, CONFIG, random_state(), {})
    model = load_model(tmp_path, torch.bfloat16, CPU)
    assert model.weights.encoder.dtype is torch.bfloat16
    assert model.weights.frequencies.dtype is torch.float32


class Pickled:
    pass


def hostile(folder: Path, kind: str) -> Path:
    """A model path with something wrong."""
    save_model(folder, CONFIG, random_state(), {})
    weights, config = folder / "model.safetensors", folder / "config.json"
    match kind:
        case "truncated safetensors":
            weights.write_bytes(weights.read_bytes()[:-100])
        case "empty safetensors":
            weights.write_bytes(b"")
        case "config is not JSON":
            config.write_text("{")
        case "config is a list":
            config.write_text("[]")
        case "config has an unknown field":
            config.write_text(json.dumps(CONFIG.to_dict() | {"n_layers": 3}))
        case "config has a string":
            config.write_text(json.dumps(CONFIG.to_dict() | {"n_layer": "3"}))
        case "config has a negative window":
            config.write_text(json.dumps(CONFIG.to_dict() | {"attention_window": -2}))
        case "config has an odd head":
            config.write_text(json.dumps(CONFIG.to_dict() | {"n_embd": 9, "n_head": 4}))
        case "no config":
            config.unlink()
        case "no weights":
            weights.unlink()
        case "integers":
            save_file(random_state() | {"encoder": torch.zeros(2, 8, 16, dtype=torch.int32)}, weights)
        case "wrong frequencies":
            save_file(random_state() | {"attn.freqs": torch.zeros(3)}, weights)
        case "no folder":
            return folder / "nowhere"
        case "truncated pt":
            torch.save(random_state(), folder / "m.pt")
            (folder / "m.pt").write_bytes((folder / "m.pt").read_bytes()[:-200])
            return folder / "m.pt"
        case "text as pt":
            (folder / "m.pt").write_text("hello")
            return folder / "m.pt"
        case "pickled config":
            torch.save({"model": random_state(), "config": Pickled()}, folder / "m.pt")
            return folder / "m.pt"
        case "a list as pt":
            torch.save([1, 2], folder / "m.pt")
            return folder / "m.pt"
        case "a number in the state dict":
            torch.save({"model": {"encoder": 1}}, folder / "m.pt")
            return folder / "m.pt"
        case "config in pt is a list":
            torch.save({"model": random_state(), "config": [1]}, folder / "m.pt")
            (folder / "config.json").unlink()
            return folder / "m.pt"
        case "no state dict in pt":
            torch.save({"weights": random_state()}, folder / "m.pt")
            return folder / "m.pt"
    return folder


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("truncated safetensors", "model.safetensors"),
        ("empty safetensors", "model.safetensors"),
        ("config is not JSON", "config.json"),
        ("config is a list", "config.json"),
        ("config has an unknown field", "n_layers"),
        ("config has a string", "n_layer"),
        ("config has a negative window", "attention_window"),
        ("config has an odd head", "n_head"),
        ("no config", "config.json"),
        ("no weights", "model.safetensors"),
        ("integers", "encoder"),
        ("wrong frequencies", "attn.freqs"),
        ("no folder", "nowhere"),
        ("truncated pt", "m.pt"),
        ("text as pt", "m.pt"),
        ("pickled config", "torch.save"),
        ("a list as pt", "list"),
        ("no state dict in pt", "model_state_dict"),
        ("a number in the state dict", "model_state_dict"),
        ("config in pt is a list", "config is a list"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_name(tmp_path: Path, kind: str, names: str) -> None:
    with pytest.raises(CheckpointError, match=names) as error:
        load_model(hostile(tmp_path, kind), torch.float32, CPU)
    assert "\n" not in error.value.message


def test_slots_never_exceed_the_budget() -> None:
    each = bytes_per_sequence(CONFIG)
    assert each == 3 * 32 * 8 * 4
    assert slots_within(10 * each + each - 1, each, most=100) == 10
    assert slots_within(10 * each, each, most=4) == 4
    assert StatePool(CONFIG, 10, CPU).states.nbytes == 10 * each
    assert StatePool(CONFIG, 20, CPU, dtype=torch.bfloat16).states.nbytes == 10 * each
    with pytest.raises(ConfigError, match=r"engine\.state_memory"):
        slots_within(each - 1, each, most=100)
