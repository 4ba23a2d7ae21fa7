"""Allocates the slots in which states lie, and plans the copies that move them. Sequences precede cached prefixes."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING

from bdh_batch.scheduler.copies import Copies, Save
from bdh_batch.scheduler.policy import Policy
from bdh_batch.scheduler.prefix_cache import Entry, PrefixCache
from bdh_batch.scheduler.slots import Slots
from bdh_batch.scheduler.transfers import Transfers
from bdh_batch.scheduler.working_set import WorkingSet

if TYPE_CHECKING:
    from bdh_batch.scheduler.sequence import Sequence

LONG = 512  # tokens; from so many on a cached prefix is worth a copy to the host before anyone has used it
WARMED_SHARE = 1 / 4  # of the slots that may be used without evidence, for states that nobody has asked for yet


class SlotAllocator:
    """Gives out the slots that states lie in, and plans the copies between them.

    Args:
        device: how many slots there are on the device.
        policy: how many there are elsewhere, and how they may be used.
    """

    def __init__(self, device: int, policy: Policy) -> None:
        first_transfer = device + policy.host_slots
        self.slots = Slots(device, policy.host_slots, policy.idle_kept)
        self.working_set = WorkingSet(device, policy.free_slots)
        self.copies = Copies(policy.copies, range(device, first_transfer))
        self.transfers = Transfers(first_transfer, policy.transfer_slots, self.copies, policy.idle_kept)
        self.cache = PrefixCache(device)
        self.parked: dict[Sequence, None] = {}  # swapped sequences whose states are still on the device
        self._idle_release = policy.idle_release
        self._swaps = policy.swaps
        self.begin(0.0)

    def begin(self, now: float) -> None:
        """Begins a new plan, at `now` in seconds."""
        self.now = now
        self.released: list[int] = []  # slots whose memory goes back to the system

    @property
    def full(self) -> bool:
        """Whether as many copies are planned as the next step has time for."""
        return self.copies.full

    @property
    def room(self) -> int:
        """The number of slots that sequences could get."""
        if self._swaps:
            return self.slots.free_count + len(self.cache)
        return self.slots.free_on_device + self.cache.on_device

    def copy(self, source: int, target: int, save: Save | None = None) -> None:
        self.copies.add(source, target, save)

    def copy_aside(self, sequence: Sequence, slot: int) -> int:
        """Copies the state of `sequence` to `slot`, and returns which of the two slots is no longer the sequence's. It
        goes on in the copy, if that is on the device: the step makes it as it computes the sequence."""
        assert sequence.slot is not None
        self.copy(sequence.slot, slot)
        if self.slots.on_device(slot):
            slot, sequence.slot = sequence.slot, slot
        return slot

    def copy_saves(self) -> Iterator[Sequence]:
        """Plans the copies of states that are to be saved, as far as there is time; the slots of these sequences are
        not theirs any more."""
        while not self.full and (save := self.transfers.take_save()) is not None:
            assert save.sequence.slot is not None
            self.copy(save.sequence.slot, save.slot, save)
            yield save.sequence

    def bring(self, sequence: Sequence, entry: Entry | None, patient: bool = False, is_only_use: bool = False) -> bool:
        """Gives `sequence` a slot on the device, with its own state or that of `entry`. False if there is none; one
        that is `patient` does not take the slot of a state that others wait for.

        Args:
            is_only_use: whether nobody else needs the state of `entry`, which was read from a file.
        """
        old = sequence.slot
        if old is not None and self.slots.on_device(old):
            return True
        slot = self._on_device(entry, patient)
        if slot is None:
            if entry is None or (patient and entry.awaited > (sequence.prefix.expects is entry)):
                return False
            return self._take_over(sequence, entry, is_only_use)
        if old is not None:
            self._move(sequence, slot)
            self.give(old)
        elif entry is not None:
            self._bring_state(entry, slot, is_only_use)
        sequence.slot = slot
        return True

    def for_entry(self, worth: float, awaited: bool) -> int | None:
        """A slot for a state that is to be cached, if there is one or something worth less; `awaited` by sequences."""
        if (slot := self._unused()) is not None:
            return slot
        least = self.cache.least(on_device=True)
        if least is not None and not least.awaited and least.worth < worth:
            return self._evict(least, None)
        if awaited and (slot := self.slots.take_untouched()) is not None:
            return slot
        return self._on_host(worth, None)

    @property
    def may_warm(self) -> bool:
        """Whether there is a slot for a state that nobody has asked for: nothing has used it, and few are cached."""
        few = self.cache.on_device < WARMED_SHARE * self.working_set.free
        return few and self.working_set.may_grow(self.slots.touched)

    def for_warming(self) -> int:
        """That slot."""
        slot = self.slots.take_untouched()
        assert slot is not None, "what may be touched is not yet"
        return slot

    def discard(self, entry: Entry) -> None:
        """Removes `entry` from the cache and frees its slot."""
        self.cache.drop(entry)
        self.give(entry.slot)

    def give(self, slot: int) -> None:
        """Frees `slot`."""
        self.slots.give(slot, self.now)

    def release_idle(self) -> None:
        """Plans that the memory of one idle slot goes back to the system: of a free one, or, where the working set has
        grown, of a cached prefix that no request has asked for. One for each plan, as it takes a moment, and none while
        copies wait, which may read it."""
        if self.copies or (due := self.release_due) is None or due > self.now:
            return
        if (since := self.transfers.idle_since) is not None and since + self._idle_release <= self.now:
            self.released.append(self.transfers.release_idle())
            return
        if (since := self.slots.idle_since) is not None and since + self._idle_release <= self.now:
            slot = self.slots.release_idle()
        else:
            entry = self._beyond_need()
            assert entry is not None
            slot = entry.slot
            self.cache.drop(entry)
            self.slots.give_untouched(slot)
        self.released.append(slot)
        self.working_set.shrink()

    @property
    def release_due(self) -> float | None:
        """The time in seconds from which on there is memory to release; None where there is none."""
        if not self._idle_release:
            return None
        entry = self._beyond_need()
        since = (self.slots.idle_since, self.transfers.idle_since, None if entry is None else entry.used)
        return min((at + self._idle_release for at in since if at is not None), default=None)

    def check(self, running: Collection[Sequence], swapped: Collection[Sequence]) -> None:
        """Raises AssertionError where an invariant does not hold."""
        held = [-1 if sequence.slot is None else sequence.slot for sequence in (*running, *swapped)]
        every = [*self.slots.free, *held, *self.transfers.held, *(entry.slot for entry in self.cache)]
        assert sorted(every) == list(range(self.slots.device + self.slots.host)), "each slot once"
        assert all(s.slot is not None and self.slots.on_device(s.slot) for s in running), "what runs is there"
        parked = {s for s in swapped if s.slot is not None and self.slots.on_device(s.slot)}
        assert set(self.parked) == parked, "what is swapped and still there is known"
        self.transfers.check()

    def _beyond_need(self) -> Entry | None:
        """The least useful cached prefix, where more memory is touched than may be without evidence."""
        if self.slots.touched <= self.working_set.free:
            return None
        entry = self.cache.least(on_device=True)
        return None if entry is None or entry.awaited else entry

    def _unused(self) -> int | None:
        """A slot on the device that is free, and whose memory is touched already or may be."""
        if (slot := self.slots.take_touched()) is not None:
            return slot
        return self.slots.take_untouched() if self.working_set.may_grow(self.slots.touched) else None

    def _bring_state(self, entry: Entry, slot: int, is_only_use: bool) -> None:
        """Plans that the state of `entry` comes to `slot`."""
        if is_only_use:
            self.copies.move(entry.slot, slot)
        else:
            self.copy(entry.slot, slot)

    def _take_over(self, sequence: Sequence, entry: Entry, is_only_use: bool) -> bool:
        """The last slot there is, is that of `entry`: becomes the slot of `sequence`, or makes room for it."""
        if self.slots.on_device(entry.slot):
            self.cache.drop(entry)
            sequence.slot = entry.slot
            return True
        sequence.slot = slot = self._on_device(None, False)
        if slot is not None and (self.cache.holds(entry) or self.transfers.holds(entry.slot)):
            self._bring_state(entry, slot, is_only_use)
        return slot is not None

    def _on_device(self, spare: Entry | None, patient: bool) -> int | None:
        if (slot := self._unused()) is not None:
            return slot
        least = self.cache.least(on_device=True, spare=spare)
        if least is not None and not least.awaited:
            return self._evict(least, spare)
        if (slot := self.slots.take_untouched()) is not None:
            return slot
        if least is not None and not patient:
            return self._evict(least, spare)
        parked = next(iter(self.parked), None)
        if parked is None or parked.slot is None or (host := self._on_host(None, spare)) is None:
            return None
        slot = parked.slot
        self._move(parked, host)
        del self.parked[parked]
        return slot

    def _move(self, sequence: Sequence, slot: int) -> None:
        if sequence.computed and sequence.slot is not None:  # else there is no state yet
            self.copy(sequence.slot, slot)
        sequence.slot = slot

    def _evict(self, entry: Entry, spare: Entry | None) -> int:
        """Frees the device slot of `entry`, which goes to the host if that is worth it."""
        slot = entry.slot
        if entry.uses or entry.awaited or entry.length >= LONG:
            host = self._on_host(entry.worth, spare)
            if host is not None:
                self.copy(slot, host)
                self.cache.move(entry, host)
                return slot
        self._evict_for_good(entry)
        return slot

    def _evict_for_good(self, entry: Entry) -> None:
        """`entry` has to go, though its slot was wanted by others, not for want of use."""
        self.cache.drop(entry)
        self.working_set.evicted(entry)

    def _on_host(self, worth: float | None, spare: Entry | None) -> int | None:
        """A slot there; a cached prefix makes room for a sequence (`worth` None), or for what is worth more."""
        if worth is None and not self._swaps:
            return None
        if (slot := self.slots.take_host()) is not None:
            return slot
        least = self.cache.least(on_device=False, spare=spare)
        if least is None or (worth is not None and (least.awaited or least.worth >= worth)):
            return None
        slot = least.slot
        self._evict_for_good(least)
        return slot
