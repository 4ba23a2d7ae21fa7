"""/v1/neurons: a model's sizes, and where its neurons fire, by a file that may be large, damaged or a stranger's."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bdh_batch.http.neurons.study_file import FILE, LONGEST_LINE, StudyFile, Unusable

if TYPE_CHECKING:
    from tests.conftest import Cli, ServeFactory, Server

TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
SHAPE = 2, 2, 128
TEXT = "The king said this to the queen: “ça ira”.\n" * 20
MAP, CONTEXTS = "/v1/neurons", "/v1/neurons/contexts"


@pytest.fixture(scope="module")
def studied(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder with its file."""
    folder = tmp_path_factory.mktemp("studied") / "tiny"
    shutil.copytree(TINY, folder)
    (folder.parent / "text.txt").write_text(TEXT)
    done = cli(
        *("model", "neurons", "--model", folder, "--text", folder.parent / "text.txt"),
        *("--out", (folder / FILE).parent, "--contexts", 3, "--words", "king,queen"),
    )
    assert done.returncode == 0, done.stderr
    head, *lines = (folder / FILE).read_text().splitlines(keepends=True)
    every_third = [line for number, line in enumerate(lines[:-1]) if number % 3]  # as if the others had never fired
    (folder / FILE).write_text("".join([head, *every_third, lines[-1]]))
    return folder


@pytest.fixture(scope="module")
def server_with(serve: ServeFactory, studied: Path) -> Iterator[Server]:
    """Its engine is in another process than what reads the file."""
    with serve("engine.replicas=1", model=studied) as server:
        yield server


def test_says_how_many_neurons_a_model_has_and_what_it_read(tiny: Server, server_with: Server) -> None:
    sizes = {"layers": 2, "heads": 2, "neurons_per_head": 128, "max_neurons": 2**20}
    assert tiny.http.get(MAP).json() == {"model": "tiny", **sizes, "study": None}
    study = {"text": "text.txt", "tokens": len(TEXT.encode()), "length": 512}
    assert server_with.http.get(MAP, params={"model": "tiny"}).json() == {"model": "tiny", **sizes, "study": study}


def test_finds_every_neuron_of_the_file_and_says_that_the_others_never_fired(
    server_with: Server, studied: Path
) -> None:
    known = {(n["layer"], n["head"], n["neuron"]): n for n in json.loads((studied / FILE).read_text())["neurons"]}
    every = [(layer, head, neuron) for layer in range(2) for head in range(2) for neuron in range(128)]
    assert 0 < len(known) < len(every)
    with StudyFile.opened(studied, SHAPE) as file:
        assert file is not None
        found = {neuron: file.find(neuron).model_dump() for neuron in every}
    assert {neuron: each for neuron, each in found.items() if neuron in known} == known
    assert all(each["active"] == 0 and not each["contexts"] for neuron, each in found.items() if neuron not in known)
    for neuron in (min(known), max(known), next(each for each in every if each not in known)):
        asked = dict(zip(("layer", "head", "neuron"), neuron, strict=True))
        assert server_with.http.get(CONTEXTS, params=asked).json() == found[neuron]


@pytest.mark.parametrize(
    ("given", "status", "param"),
    [
        ({"layer": 2}, 400, "layer"),
        ({"layer": -1}, 400, "layer"),
        ({"layer": ""}, 400, "layer"),
        ({"head": "1.0"}, 400, "head"),
        ({"neuron": "9" * 5000}, 400, "neuron"),
        ({"neuron": "²"}, 400, "neuron"),
        ({"neuron": None}, 400, "neuron"),
        ({"spare": 1}, 400, "spare"),
        ({"model": "none"}, 404, "model"),
        ({}, 404, "model"),  # of a model without the file
    ],
)
def test_bad_numbers_are_refused_by_name(tiny: Server, given: dict[str, Any], status: int, param: str | None) -> None:
    asked = {name: value for name, value in ({"layer": 0, "head": 0, "neuron": 0} | given).items() if value is not None}
    response = tiny.http.get(CONTEXTS, params=asked)
    assert (response.status_code, response.json()["error"]["param"]) == (status, param), response.text


def damaged(folder: Path, text: str) -> str:
    """What is wrong with a file that begins as one does."""
    (folder / FILE).write_text(text)
    with pytest.raises(Unusable) as error:
        find(folder)
    return str(error.value)


def find(folder: Path) -> None:
    with StudyFile.opened(folder, SHAPE) as file:
        assert file is not None
        file.find((1, 0, 0))


def test_a_file_of_a_stranger_is_refused(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"layers": 2, "heads": 2, "neurons_per_head": 128, "text": "a", "tokens": 5, "length": 5}
    neuron = {"layer": 1, "head": 0, "neuron": 0, "active": 0.5, "contexts": []}
    (tmp_path / FILE).parent.mkdir()

    def written(line: str, **other: Any) -> str:
        return damaged(tmp_path, json.dumps(facts | other)[:-1] + ',"neurons":[\n' + line + "\n]}\n")

    assert "other layers" in written("", layers=3)
    assert written("", tokens="5") == written("", text=None) == "is damaged"
    for bad in ("{", "[]", '{"layer": 1}', json.dumps(neuron | {"active": 2}), json.dumps(neuron | {"more": 1})):
        assert written(bad) == "is damaged"
    assert written(json.dumps(neuron).replace("0.5", "NaN")) == "is damaged"
    assert "too long" in written(json.dumps(neuron | {"contexts": "a" * LONGEST_LINE}))
    assert "as bdh-batch" in damaged(tmp_path, json.dumps(facts | {"neurons": [neuron]}))
    assert "as bdh-batch" in damaged(tmp_path, "")
    (tmp_path / FILE).unlink()
    os.mkfifo(tmp_path / FILE)
    with pytest.raises(Unusable, match="is not a file"), StudyFile.opened(tmp_path, SHAPE):
        pass
    (tmp_path / FILE).unlink()
    with StudyFile.opened(tmp_path, SHAPE) as file:
        assert file is None
