"""The fingerprint of a model: servers with the same one generate the same texts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from bdh_batch.processes.components import Components, ModelFolder
from bdh_batch.processes.engines import EngineInfo
from bdh_batch.processes.open_model import fingerprint_of
from bdh_batch.settings import Settings
from tests.conftest import CONFORMANCE

ENGINE = EngineInfo(256, 64, 8, 0, 0, "weights")


@pytest.fixture
def tiny() -> Iterator[Components]:
    folder = ModelFolder.of(Settings(), CONFORMANCE / "tiny")
    components = folder.fit(ENGINE.vocab_size)
    yield components
    components.close()


def test_is_another_one_where_the_weights_the_defaults_or_the_tokenizer_are(tiny: Components) -> None:
    others = [
        (ENGINE, tiny),
        (replace(ENGINE, fingerprint="other weights"), tiny),
        (ENGINE, replace(tiny, defaults=replace(tiny.defaults, temperature=0.5))),
        (ENGINE, replace(tiny, text=replace(tiny.text, eos=frozenset((3,))))),
    ]
    assert len({fingerprint_of(*each) for each in others}) == len(others)
    sizes = replace(ENGINE, slots=9, host_slots=3)  # which decide how many requests run at once, and not what comes
    assert fingerprint_of(sizes, tiny) == fingerprint_of(ENGINE, tiny)
