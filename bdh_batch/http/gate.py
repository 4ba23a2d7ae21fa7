"""The gate is closed while the model loads, and again while the server drains; requests then get a 503."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bdh_batch.backends.base import Backend
from bdh_batch.errors import ModelNotFound, Unavailable
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.text.chat import ChatTemplate, NoTemplate
from bdh_batch.text.grammar import Grammars


@dataclass(frozen=True)
class ServedModel:
    """A model that is ready, with what the API reports of it. `created` is in Unix seconds, and fixed for a model.

    `owner` is who computes it: an upstream, or this server.
    """

    backend: Backend
    name: str
    aliases: tuple[str, ...]
    created: int
    fingerprint: str
    max_model_len: int | None
    defaults: Defaults
    template: ChatTemplate | NoTemplate
    width: int  # of the hidden vectors
    tokenizer_info: Mapping[str, object]
    grammars: Grammars
    engines: Callable[[], Sequence[Mapping[str, object]]] = tuple  # engine processes, where there are some
    owner: str = "bdh_batch"

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases

    def card(self, name: str) -> Mapping[str, object]:
        """What /v1/models reports of the model under one of its names."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": self.owner,
            "root": self.name,
            "max_model_len": self.max_model_len,
        }


class Gate:
    """Gives handlers the models while they are ready, and refuses requests while the server loads or drains."""

    LOADING, DRAINING = "the model is loading", "the server is shutting down"

    def __init__(self) -> None:
        self._models: tuple[ServedModel, ...] = ()
        self._closed: str | None = self.LOADING

    def open(self, *models: ServedModel) -> None:
        """Serves these models; the first is the one of requests that name none."""
        self._models, self._closed = models, None

    def drain(self) -> None:
        self._closed = self.DRAINING

    @property
    def closed(self) -> str | None:
        """Why no new work is taken, or None."""
        return self._closed

    @property
    def models(self) -> Sequence[ServedModel]:
        """The models, for new work. Raises Unavailable while the gate is closed."""
        if self._closed is not None:
            raise Unavailable(f"The server is not ready: {self._closed}.", retry_after=5)
        return self._models

    def find(self, name: str | None, shown: Callable[[ServedModel], bool]) -> ServedModel:
        """The model of that name, for new work; None is the first.

        Raises:
            ModelNotFound: there is none; the error lists the names of those that are `shown`.
            Unavailable: the gate is closed.
        """
        models = self.models
        if name is None:
            return models[0]
        found = next((model for model in models if name in model.names), None)
        if found is None:
            raise ModelNotFound(name, [each for model in models if shown(model) for each in model.names])
        return found

    def load(self) -> int:
        """Requests under way."""
        return sum(model.backend.load() for model in self._models)

    def ready(self) -> str | None:
        """Returns why no request can be served at present, or None."""
        problems = [model.backend.ready() for model in self._models]
        return self._closed or (None if None in problems else next(iter(problems), None))

    def health(self) -> str | None:
        """What is wrong with an engine, or None; loading and draining are not wrong."""
        return next((problem for model in self._models if (problem := model.backend.health()) is not None), None)
