"""The state pool: one block of memory for each running sequence. Knows nothing about whose slot is whose."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.engine import pages
from bdh_batch.engine.copy_stream import CopyStream, CudaStreams
from bdh_batch.engine.hidden_vectors import HiddenVectors
from bdh_batch.engine.narrow_states import NarrowStates, Reserve
from bdh_batch.engine.pages import PagesAhead
from bdh_batch.errors import NotEnoughMemory

FIRST_TRANSFERS = 2  # states on their way from or to files, for which there is memory from the start


def slots_within(budget: int, each: int, most: int) -> int:
    """How many sequences' states of `each` bytes fit `budget` bytes, at most `most`.

    Raises:
        NotEnoughMemory: not even one fits.
    """
    if budget < each:
        raise NotEnoughMemory(
            f"engine.state_memory: {budget:,} bytes cannot hold one sequence's state of {each:,} bytes; "
            "raise it, set engine.state_dtype to bfloat16, or serve a smaller model"
        )
    return min(budget // each, most)


class StatePool:
    """`states` [slots, layers, h, N, D], or [slots, layers, 2, h, N, D] with a window.

    Slot s is one contiguous block, so copying it copies a whole context. Slots from `slots` on are `host_slots` more of
    the same shape in the host's memory, to which and from which states can only be copied. So are `transfer_slots`
    after those, whose memory other threads read and write: it is on its way from or to a file. With a `host_dtype` the
    states in the host's memory are narrower than the others, and rounded when they are copied there. `vectors` are the
    hidden vectors of all slots, None where the model has no latent steps.

    On the CPU, the blocks of transfer slots lie behind those of `states`, and change hands with them where a state that
    was read from a file is moved: `rows` is all of these blocks, and `row` says which one is a slot's.
    """

    def __init__(
        self,
        config: BDHConfig,
        slots: int,
        device: torch.device,
        window: int = 0,
        dtype: torch.dtype = torch.float32,
        host_slots: int = 0,
        transfer_slots: int = 0,
        huge_pages: bool = True,
        host_dtype: torch.dtype | None = None,
    ) -> None:
        shape = (slots, *self.shape_of(config, window))
        # Not filled, as slots are cleared when a sequence begins: on the CPU, those never used then take no memory.
        self._pages: PagesAhead | None = None
        self._stream = CopyStream(CudaStreams(device)) if device.type == "cuda" else None
        if device.type == "cpu":
            reserve: Reserve = partial(pages.reserve, huge=huge_pages)
            self.rows = reserve((slots + transfer_slots, *shape[1:]), dtype)
            self.states, self._transfer = self.rows[:slots], self.rows[slots:]
            self._pages = PagesAhead(self.states)
        else:
            self.rows = self.states = torch.empty(shape, dtype=dtype, device=device)
            # Pinned, so that a copy from or to a GPU runs at the speed of the bus, and does not hold up the host.
            reserve = partial(torch.empty, pin_memory=True)
            self._transfer = reserve((transfer_slots, *shape[1:]), dtype)
        self._row: list[int] = [*range(slots + transfer_slots)]  # of the slots on the device, then of transfer slots
        narrow = host_dtype is not None and host_dtype.itemsize < dtype.itemsize
        self._host = reserve((0 if narrow else host_slots, *shape[1:]), dtype)
        self._narrow = NarrowStates((host_slots if narrow else 0, *shape[1:]), host_dtype or dtype, reserve)
        self.vectors: HiddenVectors | None = None
        if config.latent_steps:
            self.vectors = HiddenVectors(slots + host_slots, transfer_slots, config.n_embd, device)

    def warm(self) -> None:
        """Has the system give the first states their memory, so that no request waits for it."""
        if self._pages is not None:
            self._pages.begin()
            for block in self._transfer[:FIRST_TRANSFERS]:
                pages.populate(block)

    def back_ahead(self, idle: bool) -> bool:
        """Has the system give states that are still to begin a little of their memory, if they lack it; with `idle`,
        several of them. Whether there was something to do."""
        return self._pages is not None and self._pages.back(idle)

    @staticmethod
    def shape_of(config: BDHConfig, window: int) -> tuple[int, ...]:
        """The shape of one state."""
        return (config.n_layer, *((2,) if window else ()), config.n_head, config.neurons_per_head, config.n_embd)

    @property
    def huge_bytes(self) -> int:
        """How much of the states on the device lies in the system's huge pages now; 0 on a GPU, which has its own."""
        return 0 if self._pages is None else pages.in_huge_pages(self.states)

    @property
    def host_slots(self) -> int:
        return len(self._host) + len(self._narrow)

    @property
    def transfer_slots(self) -> int:
        return len(self._transfer)

    def row(self, slot: int) -> int:
        """The index in `rows` of the state in a slot on the device, or on a CPU in a transfer slot."""
        return self._row[self._index(slot)]

    def can_be_begun_in(self, slot: int) -> bool:
        """Whether kernels should copy the state in a slot as they compute: it is in `rows`, and those are not a GPU's,
        which copies as fast by itself."""
        is_on_host = 0 <= slot - len(self.states) < self.host_slots
        return self._pages is not None and not is_on_host

    def clear(self, slot: int) -> None:
        """Back to the state before any token."""
        self._about_to_write(slot)
        if self._pages is None:
            self.states[slot].zero_()
        else:
            _bytes(self._slot(slot)).fill(0)

    def begin(self, used: Iterable[int]) -> None:
        """A step begins, whose segments are in those slots; its copies come next, and on a GPU are made beside it
        where they are of other slots."""
        if self._stream is not None:
            self._stream.begin(used)

    def copy(self, source: int, target: int, begin: int = 0, end: int = 1, parts: int = 1, moves: bool = False) -> None:
        """The state in slot `target` becomes that in slot `source`, or parts of it do (see `messages.Copy`); ordered
        with whatever the device computes."""
        with nullcontext() if self._stream is None else self._stream.copying(source, target):
            self._copy(source, target, begin, end, parts, moves)

    def _copy(self, source: int, target: int, begin: int, end: int, parts: int, moves: bool) -> None:
        self._about_to_write(target)
        if self.vectors is not None and end == parts:
            self.vectors.copy(source, target)
        count = math.prod(self.states.shape[1:-1])
        rows = slice(count * begin // parts, count * end // parts)
        into, come = target - len(self.states), source - len(self.states)
        if moves and self._pages is not None:
            one, other = self._index(source), self._index(target)
            self._row[one], self._row[other] = self._row[other], self._row[one]
        elif 0 <= into < len(self._narrow):
            self._narrow.store(into, self._slot(source), rows)
        elif 0 <= come < len(self._narrow):
            self._narrow.restore(come, self._slot(target), rows)
        elif self._pages is not None:
            np.copyto(_bytes(self._rows(target)[rows]), _bytes(self._rows(source)[rows]))
        else:
            self._rows(target)[rows].copy_(self._rows(source)[rows], non_blocking=True)

    def begin_copy(self, source: int, target: int) -> None:
        """As `copy`, but leaves what is in `rows` to the kernels."""
        self._about_to_write(target)
        if self.vectors is not None:
            self.vectors.copy(source, target)

    def release(self, slot: int) -> None:
        """Gives the memory of a slot back to the system, which holds no state that anyone needs."""
        if self._pages is not None:
            pages.release(self._slot(slot))

    def memory(self, slot: int) -> memoryview:
        """The bytes of a transfer slot. They can be read and written once `copies_made` has returned."""
        return _bytes(self._slot(slot)).data

    def back(self, slot: int) -> None:
        """Has the system give a transfer slot its memory now. Any thread may do it, whatever the slot holds."""
        if self._pages is not None:
            pages.populate(self._slot(slot))

    def copies_made(self) -> Callable[[], object]:
        """Returns a function that waits, in any thread, until the copies that were begun are made."""
        if self._stream is None:
            return lambda: None
        wait: Callable[[], object] = self._stream.all_begun().synchronize
        return wait

    def _about_to_write(self, slot: int) -> None:
        if self._pages is not None and slot < len(self.states) and (row := self._row[slot]) < len(self.states):
            self._pages.used(row)

    def _index(self, slot: int) -> int:
        """The index in `_row` of a slot on the device, or of a transfer slot."""
        return slot if slot < len(self.states) else slot - self.host_slots

    def _rows(self, slot: int) -> Tensor:
        """A state as a matrix, [layers · … · N, D]."""
        return self._slot(slot).view(-1, self.states.shape[-1])

    def _slot(self, slot: int) -> Tensor:
        host = slot - len(self.states)
        if 0 <= host < self.host_slots:
            return self._host[host]  # narrow ones are nobody's to see
        if self._pages is None and host >= 0:
            return self._transfer[host - self.host_slots]
        return self.rows[self.row(slot)]


def _bytes(state: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a state in main memory. numpy copies them in one thread, as fast as memory is: torch's threads would
    wait for each other where they share their cores."""
    found: np.ndarray[Any, np.dtype[np.uint8]] = state.view(-1).view(torch.uint8).numpy()
    return found
