"""How much memory a device has free."""

from __future__ import annotations

import torch

from bdh_batch.system.machine import available_memory


def free_memory(device: torch.device) -> int:
    """Bytes that could be taken on `device` now."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free)
    return available_memory()
