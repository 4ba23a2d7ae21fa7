"""The gate is closed while the model loads, and again while the server drains; requests then get a 503."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bdh_batch.backends.base import Backend
from bdh_batch.errors import ModelNotFound, Unavailable
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.text.chat import ChatTemplate
from bdh_batch.text.grammar import Grammars


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready, with what the API reports of it. `created` is in Unix seconds, and fixed for a model."""

    backend: Backend
    name: str
    aliases: tuple[str, ...]
    created: int
    fingerprint: str
    max_model_len: int | None
    defaults: Defaults
    template: ChatTemplate
    width: int  # of the hidden vectors
    tokenizer_info: Mapping[str, object]
    grammars: Grammars
    engines: Callable[[], Sequence[Mapping[str, object]]] = tuple  # engine processes, where there are some

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases

    def check_name(self, model: str | None, show_names: bool = True) -> None:
        """Raises ModelNotFound unless `model` is this one; None always is. The error lists names if `show_names`."""
        if model is not None and model not in self.names:
            raise ModelNotFound(model, self.names if show_names else ())

    def card(self, name: str) -> Mapping[str, object]:
        """What /v1/models reports of the model under one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "bdh_batch",
            "root": self.name,
            "max_model_len": self.max_model_len,
        }


class Gate:
    """Gives handlers the model while it is ready, and refuses requests while it loads or drains."""

    LOADING, DRAINING = "the model is loading", "the server is shutting down"

    def __init__(self) -> None:
        self._model: ServedModel | None = None
        self._closed: str | None = self.LOADING

    def open(self, model: ServedModel) -> None:
        self._model, self._closed = model, None

    def drain(self) -> None:
        self._closed = self.DRAINING

    @property
    def closed(self) -> str | None:
        """Why no new work is taken, or None."""
        return self._closed

    @property
    def model(self) -> ServedModel:
        """The model, for new work. Raises Unavailable while the gate is closed."""
        if self._closed is not None or self._model is None:
            raise Unavailable(f"The server is not ready: {self._closed}.", retry_after=5)
        return self._model

    def load(self) -> int:
        """Requests under way in the engine."""
        return self._model.backend.load() if self._model else 0

    def ready(self) -> str | None:
        """Returns why no request can be served at present, or None."""
        return self._closed or (self._model.backend.ready() if self._model else None)

    def health(self) -> str | None:
        """What is wrong with the engine, or None; loading and draining are not wrong."""
        return self._model.backend.health() if self._model else None
