"""Whatever is in a file, the result is a model or one clear line."""

from __future__ import annotations

import json
import pickle
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

from bdh_batch.checkpoint import checkpoint, pickles
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.checkpoint.config import BDHConfig, Given
from bdh_batch.errors import CheckpointError
from tests.model import formats
from tests.model.formats import CPU, random_state, with_freqs

CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)
INDEX = "model.safetensors.index.json"
SHARDS = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def refusal(path: Path, layers: int | None = 3) -> str:
    with pytest.raises(CheckpointError) as error:
        load_model(path, torch.float32, CPU, Given(layers))
    message = error.value.message
    assert message.isprintable(), message  # one line, whatever a name in the file holds
    return message


def state_with(**tensors: Any) -> dict[str, Any]:
    return dict(with_freqs(CONFIG, random_state(CONFIG))) | tensors


def huge() -> torch.Tensor:
    """A terabyte, in a file of a few hundred bytes."""
    return torch.zeros(1).expand(2**20, 2**18)


STATES: dict[str, tuple[Callable[[], dict[str, Any]], tuple[str, ...]]] = {
    "one tensor twice": (
        lambda: state_with(**{"_orig_mod.encoder": torch.zeros(2, 8, 16), "module.encoder": torch.zeros(1)}),
        ("encoder and _orig_mod.encoder are the same", "encoder and module.encoder are the same"),
    ),
    "shared and by layer": (lambda: state_with(**{"encoder.0": torch.zeros(2, 8, 16)}), ("encoder is there for 2 of",)),
    "a layer is missing": (
        lambda: (
            {f"encoder.{i}": torch.zeros(2, 8, 16) for i in (0, 2)}
            | {f"encoder_v.{i}": torch.zeros(2, 8, 16) for i in range(3)}
        ),
        ("encoder is there for 2 of 3 layers",),
    ),
    "names that break lines": (lambda: state_with(**{"a\nb\ud800": torch.zeros(1)}), ("extra 'a\\nb\\ud800'",)),
    "not a number": (
        lambda: state_with(encoder=torch.full((2, 8, 16), torch.nan), lm_head=torch.full((8, 11), torch.inf)),
        ("encoder has 256 numbers of 256", "lm_head has 88 numbers of 88"),
    ),
    "8 bits": (
        lambda: state_with(encoder=torch.zeros(2, 8, 16, dtype=torch.float8_e4m3fn)),
        ("encoder holds float8_e4m3fn",),
    ),
    "complex": (lambda: state_with(decoder=torch.zeros(32, 8, dtype=torch.complex64)), ("decoder holds complex64",)),
    "larger than the file": (lambda: state_with(encoder=huge()), ("encoder is not a plain tensor",)),
    "sparse": (lambda: state_with(decoder=torch.zeros(32, 8).to_sparse()), ("decoder is not a plain tensor",)),
    "nowhere": (lambda: state_with(lm_head=torch.zeros(8, 11, device="meta")), ("lm_head is not a plain tensor",)),
    "no neurons": (lambda: state_with(encoder=torch.zeros(2, 0, 16)), ("encoder [2, 0, 16]",)),
    "no multiple": (
        lambda: state_with(encoder=torch.zeros(2, 8, 15)),
        ("makes 15 neurons of a head, and it should be an even number",),
    ),
    "frequencies that are no pairs": (lambda: state_with(**{"attn.freqs": torch.rand(16)}), ("attn.freqs",)),
    "frequencies that are integers": (
        lambda: state_with(**{"attn.freqs": torch.zeros(16, dtype=torch.int64)}),
        ("attn.freqs holds int64",),
    ),
}


@pytest.mark.parametrize("kind", STATES)
def test_a_state_dict_that_is_no_model_is_refused_by_its_keys(tmp_path: Path, kind: str) -> None:
    make, parts = STATES[kind]
    (tmp_path / "config.json").write_text(json.dumps(CONFIG.to_dict()))
    if kind.startswith("no "):
        (tmp_path / "config.json").unlink()
    message = refusal(formats.save(tmp_path, make()))
    for part in (*parts, "model.pt"):
        assert part in message


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"model_type": "llama"}, "model_type is llama"),
        ({"n_layer": 10**12}, "n_layer must be a positive integer of at most 4,096, not 1000000000000"),
        ({"n_layer": 10**9}, "n_layer must be a positive integer of at most 4,096"),
        ({"n_layer": 1e9}, "n_layer must be a positive integer of at most 4,096, not 1000000000.0"),
        ({"n_layer": 10**600}, f"n_layer must be a positive integer of at most 4,096, not 1{'0' * 99}…"),
        ({"n_layer": True}, "n_layer must be a positive integer"),
        ({"n_layer": -1}, "n_layer must be a positive integer"),
        ({"n_embd": 10**9}, "n_embd must be a positive integer of at most 131,072"),
        ({"n_embd": 2**17, "n_layer": 4096}, "make states of"),
        ({"trained_context": 10**15}, "trained_context must be"),
        ({"attention_window": False}, "attention_window must be a non-negative integer"),
        ({"dropout": True}, "dropout must be a number"),
        ({"dropout": float("nan")}, "dropout must be a number"),
        ({"rope_theta": 10_000}, "attn.freqs is not of rope_theta 10000"),
        ({"rope_theta": 1}, "rope_theta must be a number from 1 to"),
        ({"rope_theta": float("nan")}, "rope_theta must be a number from 1 to"),
        ({"rope_layout": "twisted"}, "rope_layout must be interleaved or half, not 'twisted'"),
        (
            {"rope_layout": "half"},
            "attn.freqs should be finite, and the same for neurons i and i + 8 (rope_layout half)",
        ),
        ({"rotary_dim": 8}, "attn.freqs should be 0 from neuron 8 on (rotary_dim)"),
        ({"rotary_dim": 7}, "rotary_dim must be an even number of at most 16"),
        ({"rotary_dim": 18}, "rotary_dim must be an even number of at most 16"),
        ({"norm": "never"}, "norm must be every_layer or final, not 'never'"),
        ({"norm": 1}, "norm must be every_layer or final, not 1"),
        (
            {"head_neurons": 8},
            "head_neurons is 8, and mlp_internal_dim_multiplier 4 * n_embd 8 // n_head 2 is 16; leave one of them out",
        ),
        ({"per_layer_weights": 1}, "per_layer_weights must be true or false, not 1"),
        ({"per_layer_weights": True}, "per_layer_weights: its config says True, its keys say False"),
        ({"latent_steps": "yes"}, "latent_steps must be true or false, not 'yes'"),
        ({f"f{n}": 0 for n in range(10_000)}, "and 9,950 more; known: "),
        ({"n_layer": torch.tensor([6, 6])}, "n_layer has a value that no config can have, a Tensor"),
        ({"n_layer": 4}, "its config says 4, model.layers says 3"),
        ({"num_hidden_layers": 4}, "n_layer is said twice"),
        ({"dropout": "much"}, "dropout"),
        ({"tie_weights": 1}, "tie_weights"),
        ({"N": 33}, "N in its config is 33 (of all heads), and its 2 heads have 16 neurons each, 32 together"),
        ({"strict_causal\n": False}, r"unknown fields 'strict_causal\n'"),
    ],
)
def test_a_config_that_cannot_be_is_refused_by_its_field(tmp_path: Path, values: dict[str, Any], part: str) -> None:
    config = CONFIG.to_dict() | values
    if "N" in values:
        del config["mlp_internal_dim_multiplier"]
    saved = {"model": state_with(), "config": config}
    assert part in refusal(formats.save(tmp_path, saved))


@pytest.mark.parametrize(
    ("index", "part"),
    [
        ({"encoder": "../model.safetensors"}, "'../model.safetensors' is not the name of a file"),
        ({"encoder": "/etc/passwd"}, "'/etc/passwd' is not the name of a file"),
        ({"encoder": "a\0b"}, "'a\\x00b' is not the name of a file"),
        ({"encoder": ".."}, "'..' is not the name of a file"),
        ({"encoder": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors is missing"),
        ({"backbone.decoder": SHARDS[1]}, f"{SHARDS[0]} holds backbone.decoder, not listed in the index"),
        ({"stranger": SHARDS[1]}, f"{SHARDS[1]} lacks stranger"),
        ({"encoder": 1}, "weight_map"),
        ([], "weight_map"),
    ],
)
def test_an_index_leads_nowhere_else(tmp_path: Path, index: Any, part: str) -> None:
    formats.hf_shards(tmp_path, CONFIG, random_state(CONFIG))
    saved = json.loads((tmp_path / INDEX).read_text())
    saved["weight_map"] = saved["weight_map"] | index if isinstance(index, dict) else index
    (tmp_path / INDEX).write_text(json.dumps(saved))
    message = refusal(tmp_path)
    assert part in message
    assert INDEX in message


def test_nested_json_and_huge_headers_are_refused(tmp_path: Path) -> None:
    formats.native(tmp_path, CONFIG, random_state(CONFIG))
    (tmp_path / "model.safetensors").write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "model.safetensors: damaged" in refusal(tmp_path)
    save_file(random_state(CONFIG), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("[" * 200_000)
    assert "config.json: not JSON (nested too deeply)" in refusal(tmp_path)


def test_a_header_of_more_names_than_any_bdh_has_is_not_parsed(tmp_path: Path) -> None:
    formats.native(tmp_path, CONFIG, random_state(CONFIG))
    tensors = {f"t{n}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(100_000)}
    header = json.dumps(tensors).encode()
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    assert f"its header claims {len(header):,} bytes" in refusal(tmp_path)


def rewritten(file: Path, change: Callable[[str, bytes], tuple[str, bytes]], **options: Any) -> Path:
    """The zip of `torch.save`, packed again with other members."""
    with zipfile.ZipFile(file) as archive:
        members = [change(name, archive.read(name)) for name in archive.namelist()]
    with zipfile.ZipFile(file, "w", **options) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return file


@pytest.mark.parametrize("name", ["data.pkl", "version", "byteorder", "data/0"])
def test_a_zip_that_unpacks_to_more_than_itself_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    file = formats.trainer(tmp_path, CONFIG, random_state(CONFIG))
    rewritten(
        file,
        lambda member, content: (member, content + bytes(2**26 if member.endswith(name) else 0)),
        compression=zipfile.ZIP_DEFLATED,
    )
    assert file.stat().st_size < 2**20
    tracemalloc.start()
    assert "in it is compressed, which torch.save never does" in refusal(file)
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


def test_a_pickle_larger_than_any_bdh_needs_is_refused(tmp_path: Path) -> None:
    for zipped in (True, False):
        saved = {"model": state_with(), "history": ["x" * 50 + str(n) for n in range(100_000)]}
        message = refusal(formats.save(tmp_path, saved, _use_new_zipfile_serialization=zipped))
        assert "in it is larger than 4,194,304 bytes" in message


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_zip_with_two_directories_is_refused(tmp_path: Path, where: str) -> None:
    """Of two readers one could see harmless members, and the other what is to be unpacked."""
    file = formats.trainer(tmp_path, CONFIG, random_state(CONFIG))
    content = file.read_bytes()
    if where == "before":
        file.write_bytes(content + content)
    else:
        file.write_bytes(content[:-2] + len(content).to_bytes(2, "little") + content)
    assert "damaged" in refusal(file)


class Bomb:
    """A gigabyte and more, in a pickle of a few bytes."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (bytearray, (2**31,))


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_asks_for_memory_is_refused_before_it_gets_any(tmp_path: Path, zipped: bool) -> None:
    file = formats.save(tmp_path, {"model": state_with(), "config": Bomb()}, _use_new_zipfile_serialization=zipped)
    assert "builtin" in refusal(file)
    assert ".bytearray" in refusal(file)


def test_tuples_inside_tuples_do_not_end_the_process(tmp_path: Path) -> None:
    """Python hashes them by recursion without looking at its stack."""
    nested = b"\x80\x02}(" + b")" + b"\x85" * 300_000 + b"K\x01u."
    file = formats.trainer(tmp_path, CONFIG, random_state(CONFIG))
    rewritten(file, lambda name, content: (name, nested if name.endswith(".pkl") else content))
    assert "more than 50,000 tuples" in refusal(file)


def test_a_file_before_torch_1_6_must_fit_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = formats.legacy(tmp_path, CONFIG, random_state(CONFIG))
    monkeypatch.setattr(pickles, "available_memory", lambda: 1000)
    assert "is read as a whole, and 1,000 bytes are free; save it anew" in refusal(file)


def test_weights_that_do_not_fit_the_memory_are_told_and_not_tried(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    formats.native(tmp_path, CONFIG, random_state(CONFIG))
    monkeypatch.setattr(checkpoint, "free_memory", lambda device: 3775)
    assert "its weights take 3,776 bytes in float32 (model.dtype), and 3,775 are free on cpu" in refusal(tmp_path)


class Config:
    n_layer = 6


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_objects_are_refused_by_name_with_the_way_to_convert(tmp_path: Path, zipped: bool) -> None:
    saved = {"model": random_state(CONFIG), "config": Config()}
    message = refusal(formats.save(tmp_path, saved, _use_new_zipfile_serialization=zipped))
    assert "(tests.model.test_hostile_files.Config)" in message
    assert "dataclasses.asdict" in message


class Settings(dict[str, Any]):
    """A dict of a kind of its own."""


class Defaults:
    """A config whose class has what its objects do not."""

    n_layer = 9

    def __init__(self) -> None:
        self.n_embd, self.n_head, self.mlp_internal_dim_multiplier, self.vocab_size = 8, 2, 4, 11


def test_objects_that_are_more_than_their_fields_are_not_taken_for_those(tmp_path: Path) -> None:
    file = tmp_path / "model.pt"
    for saved in ({"model": state_with(), "config": Settings(n_layer=3)}, {"model": Settings(state_with())}):
        torch.save(saved, file)
        assert "test_hostile_files.Settings), which are not loaded" in refusal(file)
    torch.save({"model": state_with(), "config": Defaults()}, file)
    assert "a pickled object without n_layer, which its class may have said; give model.layers" in refusal(file, None)
    assert load_model(file, torch.float32, CPU, Given(3)).config.n_layer == 3


def test_no_code_in_a_file_is_run(tmp_path: Path) -> None:
    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "owned",))

    (tmp_path / "model.pt").write_bytes(pickle.dumps({"model": Attack()}, protocol=2))
    refusal(tmp_path / "model.pt")
    assert not (tmp_path / "owned").exists()


def test_a_string_with_an_escape_that_is_none_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "model.pt").write_bytes(b"S'\\K'\n." * 5)
    refusal(tmp_path / "model.pt")


def outcome(path: Path) -> str:
    try:
        load_model(path, torch.float32, CPU)
    except CheckpointError as error:
        return error.message
    return "a model"


@settings(deadline=None, max_examples=60)
@given(write=st.sampled_from(formats.ALL), data=st.data())
def test_a_damaged_file_is_a_model_or_one_clear_line(
    tmp_path_factory: pytest.TempPathFactory, write: formats.Writer, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    path = write(folder, CONFIG, random_state(CONFIG))
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(800, len(content) - 1)))
    content[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    file.write_bytes(content[: data.draw(st.none() | st.integers(0, len(content)))])
    assert outcome(path).isprintable()
