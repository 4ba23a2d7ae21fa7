"""States that are kept in files: between requests, and beyond the engine's end."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SavedState:
    """Names a file with the state after some tokens. An engine of the same model can begin there, any number of times.

    Args:
        path: a safetensors file that an engine wrote.
        tokens: how many tokens have entered the state: the first ones of the prompt that begins there.
    """

    path: str
    tokens: int
