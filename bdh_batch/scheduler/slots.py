"""Holds the free slots: those on the device, then those in the host's memory, numbered through.

The sequences and the prefix cache know which of the others they hold. On the device, slots whose memory has been
touched are listed apart from those whose memory has not, or has gone back to the system.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush


class Slots:
    """The free slots on the device and on the host.

    Args:
        kept: free ones on the device that are never idle.
    """

    def __init__(self, device: int, host: int = 0, kept: int = 0) -> None:
        self._kept = kept
        self.device = device
        self.host = host
        self._touched: deque[tuple[float, int]] = deque()  # free ones, and since when; the last to come goes first
        self._untouched = list(range(device))  # a heap: the lowest goes first, so that what is touched lies together
        self._free_host = list(reversed(range(device, device + host)))

    @property
    def free(self) -> list[int]:
        return [*(slot for _, slot in self._touched), *self._untouched, *self._free_host]

    @property
    def free_count(self) -> int:
        return self.free_on_device + len(self._free_host)

    @property
    def free_on_device(self) -> int:
        return len(self._touched) + len(self._untouched)

    @property
    def touched(self) -> int:
        """The number of slots on the device, free or not, whose memory has been touched."""
        return self.device - len(self._untouched)

    @property
    def idle_since(self) -> float | None:
        """When the touched slot that has been free for longest became so; None where there is none but those kept."""
        return self._touched[0][0] if len(self._touched) > self._kept else None

    def on_device(self, slot: int) -> bool:
        return slot < self.device

    def take_touched(self) -> int | None:
        return self._touched.pop()[1] if self._touched else None

    def take_untouched(self) -> int | None:
        return heappop(self._untouched) if self._untouched else None

    def take_host(self) -> int | None:
        return self._free_host.pop() if self._free_host else None

    def give(self, slot: int, now: float = 0.0) -> None:
        """Frees `slot` at `now`, in seconds that never go back."""
        if self.on_device(slot):
            self._touched.append((now, slot))
        else:
            self._free_host.append(slot)

    def give_untouched(self, slot: int) -> None:
        """Frees `slot`, on the device, whose memory goes back to the system."""
        heappush(self._untouched, slot)

    def release_idle(self) -> int:
        """The slot that has been free for longest counts as untouched again."""
        _, slot = self._touched.popleft()
        self.give_untouched(slot)
        return slot
