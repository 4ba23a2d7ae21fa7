"""The upstreams of one server, from their settings to the end: open, watched, drained."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from bdh_batch import __version__
from bdh_batch.errors import CheckpointError, ConfigError, InvalidRequest
from bdh_batch.http.gate import HostedModel, ModelInfo, ServedModel
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.observability.metrics import Metrics
from bdh_batch.observability.upstream_metrics import UpstreamMetrics
from bdh_batch.processes.components import queue_limits
from bdh_batch.processes.engines import LOADER
from bdh_batch.processes.hosted_models import HostedModels
from bdh_batch.processes.loaded_models import State
from bdh_batch.settings import Settings
from bdh_batch.system.documents import Malformed, read_text
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text.chat import ChatTemplate, NoTemplate, TemplateSource, open_template
from bdh_batch.text.grammar import Grammars
from bdh_batch.text.sandbox import Sandbox
from bdh_batch.upstreams.backend import UpstreamBackend
from bdh_batch.upstreams.config import AnyUpstream, KServeUpstream, OpenAIUpstream
from bdh_batch.upstreams.open import open_upstream

OWNER = "upstream"  # of the models, as /v1/models says
NO_VOCABULARY = "it is an upstream's"


class Upstreams:
    """The upstreams of one process.

    Args:
        alone: whether it serves nothing else.
    """

    def __init__(self, settings: Settings, metrics: Metrics, alone: bool) -> None:
        self._settings = settings
        self._metrics = metrics
        self._alone = alone
        self._models: list[HostedUpstream] = []
        self._sandboxes: list[Sandbox] = []

    async def load(self) -> Sequence[HostedModel]:
        """Raises ConfigError: a template, a key, a tokenizer or a certificate cannot be used."""
        observer = UpstreamMetrics(self._metrics.registry)
        await in_daemon_thread(partial(self._open, observer), LOADER)
        observer.watch(lambda: {each.info.name: each.backend.endpoints.all for each in self._models})
        for model in self._models:
            model.backend.start()
        return self._models

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(model.backend.drain(seconds) for model in self._models))

    async def close(self) -> None:
        for sandbox in self._sandboxes:
            sandbox.close()
        await asyncio.gather(*(model.backend.drain(0) for model in self._models))

    def _open(self, observer: UpstreamMetrics) -> None:
        for upstream in self._settings.upstreams:
            backend = open_upstream(upstream, self._settings.scheduler.request_timeout, observer)
            template: ChatTemplate | NoTemplate = NoTemplate()
            if isinstance(upstream, KServeUpstream):
                sandbox, template = _template(self._settings, upstream)
                self._sandboxes.append(sandbox)
            served = _served(self._settings, upstream, backend, template)
            self._models.append(HostedUpstream(served, backend, self._problem))

    def _problem(self) -> str | None:
        """Returns why nothing can be served at present, or None: one of several upstreams may be down."""
        problems = [model.backend.ready() for model in self._models]
        return problems[0] if self._alone and None not in problems else None


class HostedUpstream:
    """An upstream among the models of a process. It is always there, and nobody unloads it.

    Args:
        problem: returns why none of the models can be served at present, or None.
    """

    state = State.LOADED
    fingerprint = None

    def __init__(self, served: ServedModel, backend: UpstreamBackend, problem: Callable[[], str | None]) -> None:
        self._served = served
        self.backend = backend
        self._problem = problem

    @property
    def info(self) -> ModelInfo:
        return self._served.info

    def acquire(self) -> ServedModel | None:
        return self._served

    def release(self) -> None:
        """It stays."""

    async def load(self, seconds: float | None = None) -> None:
        """It is loaded."""

    async def load_for_good(self) -> None:
        """It is loaded."""

    async def unload(self) -> None:
        raise InvalidRequest("The model is an upstream's: it is not loaded here.", "model")

    def requests(self) -> int:
        return self.backend.load()

    def ready(self) -> str | None:
        return self._problem()

    def health(self) -> str | None:
        return None

    def engines(self) -> Sequence[Mapping[str, object]]:
        return ()


class NoModels:
    """The models of a gateway: none of its own."""

    async def load(self) -> Sequence[HostedModel]:
        return ()

    async def drain(self, seconds: float) -> None:
        """Nothing runs."""

    async def close(self) -> None:
        """Nothing was started."""


class WithUpstreams:
    """The models of a process and its upstreams."""

    def __init__(self, models: HostedModels, upstreams: Upstreams) -> None:
        self._parts: tuple[HostedModels, ...] = (models, upstreams)

    async def load(self) -> Sequence[HostedModel]:
        """Raises ConfigError, CheckpointError: a model cannot be loaded, or two have a name in common."""
        found: dict[str, HostedModel] = {}
        models = [model for part in self._parts for model in await part.load()]
        for model in models:
            for name in model.info.names:
                if name in found:
                    raise ConfigError(f"upstreams: {name!r} is the name of a model, too")
                found[name] = model
        return models

    async def drain(self, seconds: float) -> None:
        await asyncio.gather(*(part.drain(seconds) for part in self._parts))

    async def close(self) -> None:
        await asyncio.gather(*(part.close() for part in self._parts))


def with_upstreams(settings: Settings, models: HostedModels, metrics: Metrics) -> HostedModels:
    """Returns `models`, and the settings' upstreams beside them."""
    if not settings.upstreams:
        return models
    return WithUpstreams(models, Upstreams(settings, metrics, alone=isinstance(models, NoModels)))


def _served(
    settings: Settings, upstream: AnyUpstream, backend: UpstreamBackend, template: ChatTemplate | NoTemplate
) -> ServedModel:
    passed_on = frozenset(upstream.pass_fields) if isinstance(upstream, OpenAIUpstream) else None
    info = ModelInfo(upstream.id, tuple(upstream.aliases), int(time.time()), None, OWNER, passed_on)
    return ServedModel(
        info=info,
        revision=revision_of(upstream),
        backend=backend,
        system_fingerprint=f"{upstream.id}-bdh_batch-{__version__}",
        fingerprint=None,
        defaults=Defaults(),
        template=template,
        width=0,
        tokenizer_info={"tokenizer_class": type(backend.tokenizer).__name__},
        grammars=Grammars(
            NO_VOCABULARY, None, settings.limits.max_schema_bytes, settings.structured_output.cache_memory
        ),
    )


def revision_of(upstream: AnyUpstream) -> str:
    """Returns a hash of an upstream's settings, with the headers that are hidden elsewhere, and of its template."""
    digest = hashlib.blake2b(f"{__version__} {upstream.model_dump_json()}".encode(), digest_size=16)
    digest.update(repr(sorted(upstream.headers.items())).encode())
    if isinstance(upstream, KServeUpstream) and upstream.template is not None:
        digest.update(upstream.template.read_bytes())
    return digest.hexdigest()


def _template(settings: Settings, upstream: KServeUpstream) -> tuple[Sandbox, ChatTemplate]:
    where = f"upstreams.{upstream.id}.template"
    try:
        source = None if upstream.template is None else read_text(upstream.template)
        chosen = settings.sandbox
        found = TemplateSource(source, f"{where}: {upstream.template}")
        return open_template(found, chosen.template_seconds, chosen.template_memory, queue_limits(chosen))
    except (OSError, Malformed) as error:
        raise ConfigError(f"{where}: {upstream.template} cannot be read ({error})") from error
    except CheckpointError as error:
        raise ConfigError(str(error)) from error
