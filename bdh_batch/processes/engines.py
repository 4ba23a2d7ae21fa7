"""The engines that compute a model for a front end: one in this process, or several in others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from bdh_batch.backends.base import Backend
from bdh_batch.messages import StateLayout

if TYPE_CHECKING:  # an engine process has none, and need not import what they need
    from bdh_batch.processes.components import Components

LOADER = "bdh-loader"  # the name of the threads that load


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The sizes of a model's engine that a front end has to know.

    Args:
        width: of the hidden vectors.
        slots, host_slots: how many states fit the device, and the host's memory.
        window: how many tokens before it a token attends to; 0 is all.
        latent_steps: whether the model has them.
        fingerprint: engines with the same one generate the same tokens.
        layout: of the states that they begin in and save; None where they do not.
    """

    vocab_size: int
    width: int
    slots: int
    host_slots: int
    window: int
    fingerprint: str
    layout: StateLayout | None = None
    latent_steps: bool = False


class Engines(Protocol):
    """The engines that compute one model."""

    compiles_grammars: bool  # whether grammars are compiled there again, after the front end's sandbox

    async def load(self) -> EngineInfo:
        """Waits until an engine can compute. Raises ConfigError, CheckpointError where the model cannot be loaded."""

    def open(self, components: Components) -> Backend:
        """Returns the backend of the engines. To be called on the event loop, after `load`."""

    def states(self) -> Sequence[Mapping[str, object]]:
        """Returns pid, model, device and state of each engine process."""

    def close(self) -> None:
        """Disconnects from engine processes. Idempotent."""
