"""What the processes of one server share in their folder."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from bdh_batch.errors import ConfigError
from bdh_batch.processes.folder import RuntimeFolder


@pytest.fixture
def folder() -> Iterator[RuntimeFolder]:
    made = RuntimeFolder.make()
    yield made
    made.remove()


def test_all_engines_compute_what_the_first_one_does(folder: RuntimeFolder) -> None:
    folder.agree("these weights")
    folder.agree("these weights")
    with pytest.raises(ConfigError, match="restart the server"):
        folder.agree("others")


def test_an_engine_takes_the_place_of_one_that_was_killed(folder: RuntimeFolder) -> None:
    with folder.listen("engine-0") as killed:
        assert [*folder.engines()] == ["engine-0"]
        folder.engine("engine-0").with_suffix(".new").touch()  # of one that was killed as it began
        with folder.listen("engine-0") as now, socket.socket(socket.AF_UNIX) as client:
            client.connect(str(folder.engine("engine-0")))
            now.accept()[0].close()
            killed.setblocking(False)
            with pytest.raises(BlockingIOError):
                killed.accept()


def test_only_its_owner_can_enter_it(folder: RuntimeFolder) -> None:
    of_model = folder.of_model(3)
    of_model.make_anew()
    for path in (folder.path, of_model.path, of_model.path / "secret"):
        assert path.stat().st_mode & 0o077 == 0
    assert len(of_model.secret) == 32


def test_a_model_that_is_loaded_again_begins_anew(folder: RuntimeFolder) -> None:
    of_model = folder.of_model(0)
    of_model.make_anew()
    before = of_model.secret
    of_model.agree("these weights")
    of_model.make_anew()
    of_model.agree("others")
    assert of_model.secret != before
