"""Which tokens a row may draw: packed bits, as grammars give them, applied to logits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def masked(logits: Tensor, masks: Sequence[bytes | None]) -> Tensor:
    """`logits` [rows, V] with −∞ for each token whose bit is 0 in its row's mask.

    In a mask the lowest bit comes first; tokens beyond its end are refused. Those of grammars are longer than those of
    banned words. None leaves its row as it is, and no masks leave all.
    """
    rows = [row for row, mask in enumerate(masks) if mask is not None]
    if not rows:
        return logits
    size = -(-logits.shape[-1] // 8)
    packed = torch.frombuffer(
        bytearray().join((masks[row] or b"")[:size].ljust(size, b"\0") for row in rows), dtype=torch.uint8
    )
    packed = packed.view(len(rows), -1, 1).to(logits.device)
    bits = packed >> torch.arange(8, dtype=torch.uint8, device=logits.device) & 1
    refused = bits.view(len(rows), -1)[:, : logits.shape[-1]] == 0
    index = torch.tensor(rows, device=logits.device)
    return logits.index_copy(0, index, logits[index].masked_fill(refused, -torch.inf))
