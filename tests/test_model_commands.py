"""`bdh-batch model inspect` and `bdh-batch model convert`, as they are typed."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bdh_batch import cli as command_line
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.system.sizes import size_text
from tests.model import formats

if TYPE_CHECKING:
    from tests.conftest import Cli

BUNDLED = Path(__file__).parent.parent / "models" / "bdh-shakespeare"
CONFIG = BDHConfig(n_layer=3, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=11)
STATE = 3 * 32 * 8 * 4  # bytes, float32


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that must end well, and gives what it prints."""

    def command(*arguments: object) -> str:
        assert command_line.main(["model", *map(str, arguments)]) == 0
        return capsys.readouterr().out

    return command


@pytest.mark.parametrize("write", [formats.trainer, formats.hf_shards, formats.lightning])
def test_inspect_counts_what_serving_takes(run: Any, tmp_path: Path, write: formats.Writer) -> None:
    path = write(tmp_path, CONFIG, formats.random_state(CONFIG, dtype=torch.bfloat16))
    found = json.loads(run("inspect", path, "--json", "--memory", f"{10 * STATE} B"))
    parameters = 3 * 8 * 32 + 2 * 8 * 11
    assert found["config"]["n_layer"] == 3
    assert found["layers_told"] is True
    assert found["parameters"] == parameters
    assert found["weights_saved"] == {"bfloat16": 2 * parameters}
    scaled = parameters + 3 * 8 * 11 + 4 * (3 * 32 + 11)  # a float32 for each neuron, and an embedding of them
    sizes = {"float32": 4 * parameters, "bfloat16": 2 * parameters, "float16": 2 * parameters, "int8": scaled}
    assert found["weights_served"] == sizes
    assert found["state"] == {
        "float32": {"without_window": STATE, "with_window": 2 * STATE},
        "bfloat16": {"without_window": STATE // 2, "with_window": STATE},
    }
    assert found["sequences"]["asked"] == {
        "float32": {"without_window": 10, "with_window": 5},
        "bfloat16": {"without_window": 20, "with_window": 10},
    }
    assert found["memory"]["cpu"] // STATE == found["sequences"]["cpu"]["float32"]["without_window"] > 0
    assert found["tokenizer"] == "none: token ids only"


def test_inspect_reports_the_same_as_text(run: Any) -> None:
    text = run("inspect", BUNDLED, "--memory", "8 GiB")
    for part in (
        r"^n_layer +6$",
        r"^trained_context +2048$",
        r"^window when served +512 tokens$",
        r"^tokenizer +bytes$",
        r"^parameters +1,638,400$",
        r"^weights as saved +6.2 MiB in float32$",
        r"^state of a sequence +12.0 MiB +24.0 MiB +6.0 MiB +12.0 MiB$",
        r"^fit what was asked about, 8.0 GiB +682 +341 +1,365 +682$",
    ):
        assert re.search(part, text, re.MULTILINE), text


def test_inspect_says_what_it_was_not_told_and_what_cannot_be_served(run: Any, tmp_path: Path) -> None:
    path = formats.save(tmp_path, formats.with_freqs(CONFIG, formats.random_state(CONFIG)))
    assert re.search(r"^n_layer +6 \(not in the file", run("inspect", path), re.MULTILINE)
    assert re.search(r"^n_layer +4$", run("inspect", path, "--layers", 4), re.MULTILINE)
    (tmp_path / "tokenizer_config.json").write_text('{"type": "runes"}')
    assert re.search(r"^tokenizer +cannot be served: .*runes", run("inspect", path), re.MULTILINE)


def test_flags_say_what_a_file_leaves_open(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = {"embed.weight": "wte.weight", "encoder": "decoder_x", "encoder_v": "decoder_y", "decoder": "encoder"}
    state = formats.random_state(CONFIG)
    path = formats.save(tmp_path, {names.get(key, "readout"): tensor for key, tensor in state.items()})
    assert command_line.main(["model", "inspect", str(path), "--layers", "3"]) == 2
    assert "Give model.norm and model.rope_layout" in capsys.readouterr().err
    flags = ["--layers", 3, "--norm", "final", "--rope-layout", "half", "--rope-theta", 500, "--rotary-dim", 8]
    text = run("inspect", path, *flags)
    assert re.search(r"^kind +the paper's listing$", text, re.MULTILINE)
    variant = "norm after the last layer, RoPE of base 500, half, in 8 of 16 neurons of a head, shared weights"
    assert re.search(rf"^variant +{variant}$", text, re.MULTILINE)
    run("convert", path, tmp_path / "native", *flags)
    found = json.loads(run("inspect", tmp_path / "native", "--json"))
    assert (found["kind"], found["variant"]) == ("upstream", variant)


def test_inspect_does_not_read_the_weights(run: Any, tmp_path: Path) -> None:
    state = formats.random_state(CONFIG)
    state["encoder"].fill_(torch.nan)
    assert json.loads(run("inspect", formats.trainer(tmp_path, CONFIG, state), "--json"))["parameters"] == 944


def test_convert_writes_what_serves(run: Any, tmp_path: Path) -> None:
    source = formats.save(tmp_path, formats.with_freqs(CONFIG, formats.random_state(CONFIG)))
    assert f"bdh-batch serve --model {tmp_path / 'native'}" in run(
        "convert", source, tmp_path / "native", "--layers", 3
    )
    assert json.loads(run("inspect", tmp_path / "native", "--json"))["config"] == CONFIG.to_dict()


def test_quantize_writes_what_serves_in_a_quarter_of_the_bytes(run: Any, tmp_path: Path) -> None:
    target = tmp_path / "narrow"
    assert f"serve it: bdh-batch serve --model {target} --dtype int8" in run("quantize", BUNDLED, target)
    neurons, tokens, width = 4 * 1024, 256, 128
    saved = {"int8": (3 * neurons + tokens) * width, "float32": 4 * (tokens * width + 3 * neurons + tokens)}
    assert json.loads(run("inspect", target, "--json"))["weights_saved"] == saved
    assert json.loads(run("inspect", target, "--json"))["attention_window"] == 512


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("inspect", "nowhere"), "nowhere"),
        (("inspect", BUNDLED, "--memory", "much"), "--memory"),
        (("inspect", BUNDLED, "--memory", "1.2.3 GiB"), "--memory"),
        (("inspect", BUNDLED, "--layers", 5), "its config says 6, model.layers says 5"),
        (("convert", BUNDLED, BUNDLED, "--force"), "is where the source lies"),
        (("convert", BUNDLED, __file__), "is a file"),
        (("quantize", BUNDLED, BUNDLED, "--force"), "is where the source lies"),
    ],
)
def test_what_cannot_work_ends_in_one_line(
    capsys: pytest.CaptureFixture[str], arguments: tuple[object, ...], part: str
) -> None:
    assert command_line.main(["model", *map(str, arguments)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("bdh-batch: ")
    assert printed.err.count("\n") == 1
    assert part in printed.err


def test_the_program_itself_ends_so(cli: Cli) -> None:
    ended = cli("model", "inspect", "nowhere")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "bdh-batch: model.path: there is no model at nowhere\n"
    ended = cli("model", "inspect", BUNDLED, "--layers", 0)
    assert ended.returncode == 2
    assert "--layers: should be a positive integer, not '0'" in ended.stderr


@pytest.mark.parametrize(
    ("size", "text"), [(7, "7 B"), (1536, "1.5 KiB"), (3 * 2**40, "3.0 TiB"), (2**52, "4096.0 TiB")]
)
def test_sizes_are_said_as_people_say_them(size: int, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize("theta", ["nan", "inf", "1", "-5"])
def test_a_base_of_rope_is_above_one(capsys: pytest.CaptureFixture[str], theta: str) -> None:
    with pytest.raises(SystemExit):
        command_line.main(["model", "inspect", str(BUNDLED), "--rope-theta", theta])
    assert "--rope-theta: should be above 1" in capsys.readouterr().err
