"""The state pool: one block of memory for each running sequence. Knows nothing about whose slot is whose."""

from __future__ import annotations

import torch
from torch import Tensor

from bdh_batch.errors import ConfigError
from bdh_batch.machine import available_memory
from bdh_batch.model.config import BDHConfig
from bdh_batch.model.pages import PagesAhead


def bytes_per_sequence(config: BDHConfig, window: int = 0, dtype: torch.dtype = torch.float32) -> int:
    """A window keeps the sum over its earlier block besides the sum over all of it."""
    return config.state_elements * dtype.itemsize * (2 if window else 1)


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()


def slots_within(budget: int, each: int, most: int) -> int:
    """How many sequences' states of `each` bytes fit `budget` bytes, at most `most`.

    Raises:
        ConfigError: not even one fits.
    """
    if budget < each:
        raise ConfigError(
            f"engine.state_memory: {budget:,} bytes cannot hold one sequence's state of {each:,} bytes; "
            "raise it, set engine.state_dtype to bfloat16, or serve a smaller model"
        )
    return min(budget // each, most)


class StatePool:
    """`states` [slots, layers, h, N, D], or [slots, layers, 2, h, N, D] with a window.

    Slot s is one contiguous block, so copying it copies a whole context. Slots from `slots` on are `host_slots` more of
    the same shape in the host's memory, to which and from which states can only be copied.
    """

    def __init__(
        self,
        config: BDHConfig,
        slots: int,
        device: torch.device,
        window: int = 0,
        dtype: torch.dtype = torch.float32,
        host_slots: int = 0,
    ) -> None:
        blocks = (2,) if window else ()
        shape = (slots, config.n_layer, *blocks, config.n_head, config.neurons_per_head, config.n_embd)
        # Not filled, as slots are cleared when a sequence begins: on the CPU, those never used then take no memory.
        self.states: Tensor = torch.empty(shape, dtype=dtype, device=device)
        # Pinned, so that a copy from or to a GPU runs at the speed of the bus, and does not hold up the host.
        self._host = torch.empty((host_slots, *shape[1:]), dtype=dtype, pin_memory=device.type == "cuda")
        self._pages = PagesAhead(self.states) if device.type == "cpu" else None

    @property
    def host_slots(self) -> int:
        return len(self._host)

    def clear(self, slot: int) -> None:
        """Back to the state before any token."""
        self._about_to_write(slot)
        self.states[slot].zero_()

    def copy(self, source: int, target: int) -> None:
        """The state in slot `target` becomes that in slot `source`; ordered with whatever the device computes."""
        self._about_to_write(target)
        self._slot(target).copy_(self._slot(source), non_blocking=True)

    def _about_to_write(self, slot: int) -> None:
        if self._pages is not None and slot < len(self.states):
            self._pages.used(slot)

    def _slot(self, slot: int) -> Tensor:
        slots = len(self.states)
        return self.states[slot] if slot < slots else self._host[slot - slots]
