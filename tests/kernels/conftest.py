from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

# Triton reads this when it is imported, for the whole process, and nothing has imported it yet. Compiled kernels are
# looked at in a process of their own (`aot.py`). Where there is a GPU, the same tests run on it.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # Triton from 3.9 on warns where this is not said


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """What torch.empty gives is NaN: an output that is not written shows."""
    torch.use_deterministic_algorithms(True)  # without which the next line has no effect
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)
