"""Bounds the size of a step: smaller after one that ran out of memory, and larger again after many that did not."""

from __future__ import annotations

PATIENCE = 512  # steps before more is tried again; twice as many each time that that was too much
MOST_PATIENCE = 2**20
LEAST_PREFILL = 16  # prompt tokens that go in a step whatever it may take, so that prompts get through


class StepSize:
    """Bounds a step by what memory has allowed so far.

    Args:
        prefill: most prompt tokens in a step.
        width: most sequences that run at a time.
    """

    def __init__(self, prefill: int, width: int) -> None:
        self.prefill = self._most_prefill = prefill
        self.width = self._most_width = width
        self._patience = PATIENCE
        self._succeeded = 0
        self._has_grown = False  # since it shrank

    @property
    def is_reduced(self) -> bool:
        return self.prefill < self._most_prefill or self.width < self._most_width

    def shrink(self, prefill: int, sequences: int) -> bool:
        """Lowers the bound after a step of `prefill` prompt tokens and so many sequences; False where it is least."""
        least = min(LEAST_PREFILL, self._most_prefill)
        if prefill and self.prefill > least:
            self.prefill = max(least, self.prefill // 2)
        elif sequences > 1:
            self.width = min(self.width, sequences // 2)
        else:
            return False
        if self._has_grown:
            self._patience = min(2 * self._patience, MOST_PATIENCE)
        self._succeeded, self._has_grown = 0, False
        return True

    def succeeded(self) -> None:
        """Raises the bound after many steps that had enough memory."""
        if not self.is_reduced:
            return
        self._succeeded += 1
        if self._succeeded >= self._patience:
            self._succeeded, self._has_grown = 0, True
            self.prefill = min(2 * self.prefill, self._most_prefill)
            self.width = min(2 * self.width, self._most_width)
