"""Gives each engine process its part of the machine: a device, and cores of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bdh_batch.errors import ConfigError
from bdh_batch.processes.children import Role
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.system.machine import cores, usable_cores

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # one is there where PyTorch can find a GPU


def engine_roles(models: Sequence[ModelSettings], most_loaded: int | None) -> list[list[Role]]:
    """Returns the roles of each model's engine processes.

    Engines on the CPU share the cores equally, as many engines as can be loaded at once, or have as many each as
    `engine.threads` says.

    Args:
        most_loaded: models at once; None is all.

    Raises:
        ConfigError: `engine.threads` of all engines together are more than there are cores.
    """
    devices = [model.settings.engine.devices or [""] * (model.settings.engine.replicas or 1) for model in models]
    at_once = _at_once(models, [len(each) for each in devices], most_loaded)
    roles: list[list[Role]] = []
    number = 0
    for index, (model, own) in enumerate(zip(models, devices, strict=True)):
        roles.append([])
        for device in own:
            cores = _cores(model, number, at_once) if _computes_on_cpu(model, device) else ()
            roles[-1].append(Role("engine", number, index, device, cores))
            number += 1
    return roles


def _at_once(models: Sequence[ModelSettings], engines: Sequence[int], most_loaded: int | None) -> int:
    """Returns the largest number of engines that are there at once."""
    warm = [count for model, count in zip(models, engines, strict=True) if not model.on_demand]
    on_demand = sorted((count for model, count in zip(models, engines, strict=True) if model.on_demand), reverse=True)
    return sum(warm) + sum(on_demand if most_loaded is None else on_demand[: most_loaded - len(warm)])


def _computes_on_cpu(model: ModelSettings, device: str) -> bool:
    chosen = device or model.settings.model.device
    return chosen == "cpu" or (chosen == "auto" and not any(Path(driver).exists() for driver in GPU_DRIVERS))


def _cores(model: ModelSettings, number: int, at_once: int) -> tuple[int, ...]:
    """Returns the cores of an engine; none where it may have all of them."""
    usable, asked = usable_cores(), model.settings.engine.threads
    if asked is not None and asked * at_once > max(usable, at_once):
        text = f"{asked} for each of {at_once} engines are more than the {usable} cores that can be used"
        raise ConfigError(f"engine.threads: {text}")
    if at_once == 1:
        return ()
    every, each = cores(), asked or max(1, usable // at_once)
    return tuple(sorted({every[(number * each + nth) % len(every)] for nth in range(each)}))
