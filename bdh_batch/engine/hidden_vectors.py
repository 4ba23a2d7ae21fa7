"""The final hidden vector of the last token in each slot, which lies and moves beside the state: a latent step begins
with it. Only models with latent steps have them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from bdh_batch.messages import LATENT_FROZEN, Segment


class HiddenVectors:
    """One float32 vector [D] for each slot, of all kinds, whatever dtype its state has.

    Args:
        slots: on the device and on the host. All their vectors lie on the device: they are small.
        transfer_slots: those after them, whose vectors lie in main memory as their states do.
    """

    def __init__(self, slots: int, transfer_slots: int, width: int, device: torch.device) -> None:
        self._own = torch.zeros(slots, width, device=device)
        self._transfer = torch.zeros(transfer_slots, width, pin_memory=device.type != "cpu")

    def copy(self, source: int, target: int) -> None:
        self._of(target).copy_(self._of(source), non_blocking=True)

    def memory(self, slot: int) -> memoryview:
        """The bytes of a transfer slot's vector."""
        return self._of(slot).view(torch.uint8).numpy().data.cast("B")

    def keep(self, segments: Sequence[Segment], hidden: Tensor) -> None:
        """Takes the last vector of each segment from `hidden` [T, D], those of all their tokens."""
        ends = accumulate(len(segment.tokens) for segment in segments)
        rows = torch.tensor([end - 1 for end in ends], device=hidden.device)
        self._own[torch.tensor([segment.slot for segment in segments], device=hidden.device)] = hidden[rows]

    def entering(self, slots: Sequence[int]) -> Tensor:
        """The vectors [K, D] of slots on the device."""
        return self._own[torch.tensor(slots, device=self._own.device)]

    def _of(self, slot: int) -> Tensor:
        own = len(self._own)
        return self._own[slot] if slot < own else self._transfer[slot - own]


def latent_segments(segments: Sequence[Segment]) -> tuple[list[int], list[bool]]:
    """Which segments are latent steps, by their indices; and, where one only reads its state, which do."""
    latent = [at for at, segment in enumerate(segments) if segment.tokens[0] < 0]
    if not any(segments[at].tokens[0] == LATENT_FROZEN for at in latent):
        return latent, []
    return latent, [segment.tokens[0] == LATENT_FROZEN for segment in segments]
