"""`config/default.yaml` is the options as they are: complete, explained, and without effect when loaded."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bdh_batch import settings

FILE = Path(__file__).parent.parent / "config" / "default.yaml"


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.upper().startswith(settings.ENV_PREFIX):
            monkeypatch.delenv(name)


def test_the_file_is_what_config_default_prints() -> None:
    assert FILE.read_text() == settings.default_yaml(), "run: bdh-batch config default > config/default.yaml"


def test_the_file_loads_to_the_defaults() -> None:
    assert settings.load(FILE).settings == settings.load().settings


def test_the_file_sets_every_option() -> None:
    assert settings.load(FILE).origins.keys() == settings.options().keys()


def test_every_option_is_explained_in_a_sentence() -> None:
    assert [option for option, (_, text) in settings.options().items() if not text.endswith(".")] == []
