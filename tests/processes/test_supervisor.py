"""What a supervisor gives its children."""

from __future__ import annotations

import pytest

from bdh_batch.processes.supervisor import Role, engine_roles, environment
from bdh_batch.settings import load


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        ("", "cuda:1", "1"),
        ("4,5", "cuda:1", "5"),
        ("GPU-a, GPU-b", "cuda:0", "GPU-a"),
        ("4,5", "cuda", "4,5"),
        ("4,5", "cpu", "4,5"),
        ("4,5", "", "4,5"),
    ],
)
def test_an_engine_sees_its_own_gpu_of_those_that_the_server_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str, device: str, expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment(Role("engine", 0, device))["CUDA_VISIBLE_DEVICES"] == expected


def test_there_is_an_engine_for_each_device_or_replica() -> None:
    def devices(*overrides: tuple[str, object]) -> list[str]:
        return [role.device for role in engine_roles(load(overrides=overrides).settings)]

    assert devices(("engine.replicas", "3")) == ["", "", ""]
    assert devices(("engine.devices", "cuda:0,cuda:1")) == ["cuda:0", "cuda:1"]
    assert devices(("server.workers", "2")) == [""]
    [only] = engine_roles(load(overrides=[("engine.replicas", "1"), ("engine.threads", "1")]).settings)
    assert only.threads is None  # as the settings say
