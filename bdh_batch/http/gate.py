"""The gate gives handlers the models. It is closed while they load and while the server drains: requests get a 503."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bdh_batch.backends.base import Backend
from bdh_batch.errors import ModelNotFound, Unavailable
from bdh_batch.http.auth.caller import Caller
from bdh_batch.http.errors import Forbidden
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.messages import StateLayout
from bdh_batch.text.chat import ChatTemplate, NoTemplate
from bdh_batch.text.grammar import Grammars


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model whether it is loaded or not.

    `created` is in Unix seconds, and fixed for a model. `owner` is who computes it: an upstream, or this server.
    """

    name: str
    aliases: tuple[str, ...]
    created: int
    max_model_len: int | None
    owner: str = "bdh_batch"
    passed_on: frozenset[str] | None = None  # what it is given of requests although this server does not know it

    @property
    def names(self) -> tuple[str, ...]:
        return self.name, *self.aliases


@dataclass(frozen=True)
class ServedModel:
    """A model that is loaded.

    Args:
        revision: another one where its files or settings are others.
        system_fingerprint: names the model and the build in responses.
        fingerprint: servers with the same one generate the same text for the same request; None is unknown.
        layout: of its states; None where it has none.
        folder: where its files are; None where they are not here.
    """

    info: ModelInfo
    revision: str
    backend: Backend
    system_fingerprint: str
    fingerprint: str | None
    defaults: Defaults
    template: ChatTemplate | NoTemplate
    width: int  # of the hidden vectors
    tokenizer_info: Mapping[str, object]
    grammars: Grammars
    layout: StateLayout | None = None
    folder: Path | None = None

    @property
    def name(self) -> str:
        return self.info.name

    @property
    def max_model_len(self) -> int | None:
        return self.info.max_model_len


class HostedModel(Protocol):
    """One of the models that the server has, loaded or not."""

    @property
    def info(self) -> ModelInfo: ...

    @property
    def fingerprint(self) -> str | None:
        """That of the model while it is loaded."""

    @property
    def state(self) -> str:
        """ "loaded", "loading", "unloaded", "unloading" or "failed"."""

    def acquire(self) -> ServedModel | None:
        """Returns the model, which stays loaded until it is released; None if it is not loaded."""

    def release(self) -> None:
        """Ends one use of the model."""

    async def load(self, seconds: float | None = None) -> None:
        """Waits until the model is loaded, so long at most.

        Raises:
            QueueFull, QueueTimeout, Unavailable
        """

    async def load_for_good(self) -> None:
        """Loads the model, as an operator asks for it. Raises InvalidRequest, Unavailable."""

    async def unload(self) -> None:
        """Unloads the model. Raises InvalidRequest, ModelInUse, Unavailable."""

    def requests(self) -> int:
        """The number of requests that are being computed."""

    def ready(self) -> str | None:
        """Returns why a model that should be loaded cannot generate at present, or None."""

    def health(self) -> str | None:
        """Returns what is wrong in this process, or None; loading and draining are not wrong."""

    def engines(self) -> Sequence[Mapping[str, object]]:
        """Returns pid, model, device and state of each engine process."""


class Gate:
    """Gives handlers the models while the server is ready, and refuses requests while it loads or drains."""

    LOADING, DRAINING = "the model is loading", "the server is shutting down"

    def __init__(self) -> None:
        self._models: Sequence[HostedModel] = ()
        self._by_name: Mapping[str, HostedModel] = {}
        self._closed: str | None = self.LOADING

    def open(self, models: Sequence[HostedModel]) -> None:
        self._models, self._closed = models, None
        self._by_name = {name: model for model in models for name in model.info.names}

    def drain(self) -> None:
        self._closed = self.DRAINING

    @property
    def closed(self) -> str | None:
        """Why no new work is taken, or None."""
        return self._closed

    @property
    def hosted(self) -> Sequence[HostedModel]:
        """All models, whoever may use them."""
        return self._models

    def models(self, caller: Caller) -> Sequence[HostedModel]:
        """The models that the caller may use. Raises Unavailable while the gate is closed."""
        if self._closed is not None:
            raise Unavailable(f"The server is not ready: {self._closed}.", retry_after=5)
        return [model for model in self._models if caller.may_use(model.info.names)]

    def find(self, caller: Caller, name: str | None) -> HostedModel:
        """Returns the model of that name; None is the first one that the caller may use.

        Raises:
            ModelNotFound
            Forbidden: the caller's key is not for it.
            Unavailable: the gate is closed.
        """
        usable = self.models(caller)
        if name is None:
            model = usable[0] if usable else self._models[0]
        elif name in self._by_name:
            model = self._by_name[name]
        else:
            raise ModelNotFound(name, [known for each in usable for known in each.info.names])
        caller.check_model(name or model.info.name, model.info.names)
        return model

    def passed_on(self, caller: Caller, name: str | None) -> frozenset[str] | None:
        """What of a request goes on to the model of that name; None also where there is none for the caller."""
        try:
            return self.find(caller, name).info.passed_on
        except (ModelNotFound, Forbidden, Unavailable):
            return None  # the request is told so once its body has been read

    def requests(self) -> int:
        """Requests under way in the engines."""
        return sum(model.requests() for model in self._models)

    def ready(self) -> str | None:
        """Returns why a model cannot generate at present, or None."""
        return self._closed or self._first(model.ready for model in self._models)

    def health(self) -> str | None:
        """What is wrong with this process, or None; loading and draining are not wrong."""
        return self._first(model.health for model in self._models)

    def engines(self, caller: Caller) -> Sequence[Mapping[str, object]]:
        """Returns what is known of the engine processes of each model that the caller may use."""
        return [engine for model in self.models(caller) for engine in model.engines()]

    @staticmethod
    def _first(checks: Iterable[Callable[[], str | None]]) -> str | None:
        return next((problem for check in checks if (problem := check()) is not None), None)


def card(model: HostedModel, name: str) -> Mapping[str, object]:
    """What /v1/models reports of a model under one of its names."""
    info = model.info
    return {
        "id": name,
        "object": "model",
        "created": info.created,
        "owned_by": info.owner,
        "root": info.name,
        "max_model_len": info.max_model_len,
        "fingerprint": model.fingerprint,
        "status": {"value": model.state},
    }
