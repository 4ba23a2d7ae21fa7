"""Gives each engine process its part of the machine: a device, and cores of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from bdh_batch.errors import ConfigError
from bdh_batch.processes.children import Role
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.system.machine import cores, usable_cores

GPU_DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")  # one is there where PyTorch can find a GPU


def engine_roles(models: Sequence[ModelSettings], most_loaded: int | None) -> list[list[Role]]:
    """Returns the roles of each model's engine processes.

    Engines on the CPU have as many threads each as `engine.threads` says; the others share what is left of the cores
    equally, as many engines as can be loaded at once.

    Args:
        most_loaded: models at once; None is all.

    Raises:
        ConfigError: `engine.threads` of all engines together are more than there are cores.
    """
    devices = [model.settings.engine.devices or [""] * (model.settings.engine.replicas or 1) for model in models]
    asked = [model.settings.engine.threads for model in models]
    at_once = _most_at_once(models, [len(each) for each in devices], most_loaded)
    said = _most_at_once(models, [len(own) * (asked[at] or 0) for at, own in enumerate(devices)], most_loaded)
    silent = _most_at_once(models, [len(own) * (asked[at] is None) for at, own in enumerate(devices)], most_loaded)
    usable = usable_cores()
    if said > max(usable, at_once):
        text = f"the engines that can be loaded at once have {said} in all, more than the {usable} cores to be used"
        raise ConfigError(f"engine.threads: {text}")
    share = None if at_once == 1 else max(1, (usable - said) // max(1, silent))
    roles: list[list[Role]] = []
    number = 0
    for index, (model, own) in enumerate(zip(models, devices, strict=True)):
        roles.append([])
        for device in own:
            threads = (asked[index] or share) if _computes_on_cpu(model, device) else None
            roles[-1].append(Role("engine", number, index, device, threads))
            number += 1
    return roles


class FreeCores:
    """The cores of the machine, of which engines get those that fewest others have."""

    def __init__(self) -> None:
        self._users = Counter(dict.fromkeys(cores(), 0))
        self._are_ours = usable_cores() == len(self._users)  # else a quota gives time on all of them, not cores

    def take(self, count: int | None) -> tuple[int, ...]:
        """Returns so many cores; none where any may be used."""
        if count is None or not self._are_ours or count >= len(self._users):
            return ()
        chosen = sorted(sorted(self._users), key=lambda core: self._users[core])[:count]
        self._users.update(chosen)
        return tuple(sorted(chosen))

    def give_back(self, chosen: Sequence[int]) -> None:
        """Has others use cores that were taken."""
        self._users.subtract(chosen)


def _most_at_once(models: Sequence[ModelSettings], each: Sequence[int], most_loaded: int | None) -> int:
    """Returns the largest sum of what `each` model has, over models that can be loaded at once."""
    warm = [count for model, count in zip(models, each, strict=True) if not model.on_demand]
    on_demand = sorted((count for model, count in zip(models, each, strict=True) if model.on_demand), reverse=True)
    return sum(warm) + sum(on_demand if most_loaded is None else on_demand[: most_loaded - len(warm)])


def _computes_on_cpu(model: ModelSettings, device: str) -> bool:
    chosen = device or model.settings.model.device
    return chosen == "cpu" or (chosen == "auto" and not any(Path(driver).exists() for driver in GPU_DRIVERS))
