"""Where states lie, and the copies that move them. Sequences come before what is kept for later."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from bdh_batch.messages import Copy
from bdh_batch.scheduler.prefix_cache import Entry, PrefixCache
from bdh_batch.scheduler.slots import Slots

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

LONG = 512  # tokens; from so many on a kept state is worth a copy to the host before anyone has used it


class Places:
    """
    Args:
        device, host: how many states have a place there.
    """

    def __init__(self, device: int, host: int) -> None:
        self.slots = Slots(device, host)
        self.cached = 0  # places that the prefix cache holds
        self.begin()

    def begin(self) -> None:
        """A new plan."""
        self.copies: list[Copy] = []
        self.moved: list[Sequence] = []  # whose states are what these copies make them

    @property
    def room(self) -> int:
        """Places that a sequence could have."""
        return self.slots.free_count + self.cached

    def copy(self, source: int, target: int) -> None:
        self.copies.append(Copy(source, target))

    def bring(
        self,
        sequence: Sequence,
        suspended: Iterable[Sequence],
        cache: PrefixCache,
        entry: Entry | None,
        patient: bool = False,
    ) -> bool:
        """Gives `sequence` a slot on the device, with its own state or that of `entry`. False if there is none; one
        that is `patient` does not take the place of a state that others wait for."""
        old = sequence.slot
        if old is not None and self.slots.on_device(old):
            return True
        slot = self._on_device(sequence, suspended, cache, entry, patient)
        if slot is None:
            if entry is None or (patient and entry.awaited > (sequence.expects is entry)):
                return False
            return self._take_over(sequence, suspended, cache, entry)
        if old is not None:
            self._move(sequence, slot)
            self.slots.give(old)
        elif entry is not None:
            self.copy(entry.slot, slot)
            self.moved.append(sequence)
        sequence.slot = slot
        return True

    def for_entry(self, cache: PrefixCache, worth: float) -> int | None:
        """A slot for a state that is to be kept, if something worth less lies where it could."""
        if (slot := self.slots.take_device()) is not None:
            return slot
        least = cache.least(on_device=True)
        if least is not None and not least.awaited and least.worth < worth:
            return self._evict(least, cache, None)
        return self._on_host(cache, worth, None)

    def discard(self, entry: Entry, cache: PrefixCache, give: bool = True) -> None:
        cache.drop(entry)
        self.cached -= 1
        if give:
            self.slots.give(entry.slot)

    def _take_over(self, sequence: Sequence, suspended: Iterable[Sequence], cache: PrefixCache, entry: Entry) -> bool:
        """The last place there is, is that of `entry`: becomes the slot of `sequence`, or makes room for it."""
        if self.slots.on_device(entry.slot):
            self.discard(entry, cache, give=False)
            sequence.slot = entry.slot
            if any(copy.target == entry.slot for copy in self.copies):
                self.moved.append(sequence)
            return True
        sequence.slot = slot = self._on_device(sequence, suspended, cache, None, False)
        if slot is not None and cache.holds(entry):
            self.copy(entry.slot, slot)
            self.moved.append(sequence)
        return slot is not None

    def _on_device(
        self, sequence: Sequence, suspended: Iterable[Sequence], cache: PrefixCache, spare: Entry | None, patient: bool
    ) -> int | None:
        if (slot := self.slots.take_device()) is not None:
            return slot
        least = cache.least(on_device=True, spare=spare)
        if least is not None and not (patient and least.awaited):
            return self._evict(least, cache, spare)
        for parked in suspended:
            if parked is not sequence and parked.slot is not None and self.slots.on_device(parked.slot):
                host = self._on_host(cache, None, spare)
                if host is None:
                    return None
                slot = parked.slot
                self._move(parked, host)
                return slot
        return None

    def _move(self, sequence: Sequence, slot: int) -> None:
        if sequence.computed and sequence.slot is not None:  # else there is no state yet
            self.copy(sequence.slot, slot)
        sequence.slot = slot
        self.moved.append(sequence)

    def _evict(self, entry: Entry, cache: PrefixCache, spare: Entry | None) -> int:
        """Frees the device slot of `entry`, which goes to the host if that is worth it."""
        slot = entry.slot
        if entry.uses or entry.awaited or entry.length >= LONG:
            host = self._on_host(cache, entry.worth, spare)
            if host is not None:
                self.copy(slot, host)
                cache.move(entry, host)
                return slot
        self.discard(entry, cache, give=False)
        return slot

    def _on_host(self, cache: PrefixCache, worth: float | None, spare: Entry | None) -> int | None:
        """A slot there; what is kept makes room for a sequence (`worth` None), or for what is worth more."""
        if (slot := self.slots.take_host()) is not None:
            return slot
        least = cache.least(on_device=False, spare=spare)
        if least is None or (worth is not None and (least.awaited or least.worth >= worth)):
            return None
        slot = least.slot
        self.discard(least, cache, give=False)
        return slot
