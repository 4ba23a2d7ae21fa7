"""States that are kept in files: between requests, and beyond the engine's end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

INVALID = "invalid_state"  # the code of errors about states that cannot be used
Warmed = Literal["cached", "no room", "unreadable"]  # what has become of a state that was to be read in advance
SIZES = {"F32": 4, "BF16": 2}  # bytes of a number, by the dtype's name in a file


@dataclass(frozen=True, slots=True)
class SavedState:
    """Names a file with the state after some tokens. An engine of the same model can begin there, any number of times.

    Args:
        path: a safetensors file that an engine wrote.
        tokens: how many tokens have entered the state: the first ones of the prompt that begins there.
    """

    path: str
    tokens: int


@dataclass(frozen=True, slots=True)
class StateLayout:
    """What the states of an engine are: only a state of an equal layout can go on there.

    Args:
        fingerprint: of the weights, as they are in memory.
        shape: of one state, [layers, heads, N, D], or [layers, 2, heads, N, D] with a window.
        window: tokens that a token can look back on; 0 is all.
        hidden: float32 numbers of a hidden vector beside it; 0 where the model has no latent steps.
    """

    fingerprint: str
    dtype: Literal["F32", "BF16"]
    shape: tuple[int, ...]
    window: int
    hidden: int = 0

    @property
    def size(self) -> int:
        """Bytes of one state, without its hidden vector."""
        size = SIZES[self.dtype]
        for length in self.shape:
            size *= length
        return size

    def problem(self, metadata: Mapping[str, Any], tensor: Mapping[str, Any]) -> str | None:
        """What makes a file with such a header one of another layout; None where nothing does."""
        if metadata.get("fingerprint") != self.fingerprint:
            return "it is a state of another model."
        if metadata.get("window") != str(self.window):
            return f"its attention window is another one than this engine's, {self.window or 'none'}."
        if tensor.get("dtype") != self.dtype:
            return f"its dtype is not this engine's, {self.dtype} (engine.state_dtype)."
        if tensor.get("shape") != list(self.shape):
            return f"its shape is not this engine's, {list(self.shape)}."
        return None
