"""Which slots are free: those on the device, then those in the host's memory, numbered through.

Who holds the others is known where they are held: in the sequences and in the prefix cache.
"""

from __future__ import annotations


class Slots:
    def __init__(self, device: int, host: int = 0) -> None:
        self.device = device
        self.host = host
        # Last in, first out: memory that was never touched stays untouched as long as it can.
        self._free_device = list(reversed(range(device)))
        self._free_host = list(reversed(range(device, device + host)))

    @property
    def free(self) -> list[int]:
        return [*self._free_device, *self._free_host]

    @property
    def free_count(self) -> int:
        return len(self._free_device) + len(self._free_host)

    def on_device(self, slot: int) -> bool:
        return slot < self.device

    def take_device(self) -> int | None:
        return self._free_device.pop() if self._free_device else None

    def take_host(self) -> int | None:
        return self._free_host.pop() if self._free_host else None

    def give(self, slot: int) -> None:
        (self._free_device if self.on_device(slot) else self._free_host).append(slot)
