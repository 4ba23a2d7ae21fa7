"""The upstreams of one server, from their settings to the end: open, watched, drained."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from bdh_batch import __version__
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.http.gate import ServedModel
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.observability.metrics import Metrics
from bdh_batch.observability.upstream_metrics import UpstreamMetrics
from bdh_batch.processes.components import queue_limits
from bdh_batch.settings import Settings
from bdh_batch.system.documents import Malformed, read_text
from bdh_batch.text.chat import ChatTemplate, NoTemplate, TemplateSource, open_template
from bdh_batch.text.grammar import Grammars
from bdh_batch.text.sandbox import Sandbox
from bdh_batch.upstreams.backend import UpstreamBackend
from bdh_batch.upstreams.config import AnyUpstream, KServeUpstream
from bdh_batch.upstreams.open import open_upstream

OWNER = "upstream"  # of the models, as /v1/models says
NO_VOCABULARY = "it is an upstream's"


@dataclass(frozen=True)
class Upstreams:
    """The upstreams of one server."""

    models: Sequence[ServedModel]
    backends: Sequence[UpstreamBackend]
    sandboxes: Sequence[Sandbox]

    @classmethod
    def open(cls, settings: Settings, metrics: Metrics) -> Self:
        """Opens all upstreams of the settings. Blocks until their templates are compiled.

        Raises:
            ConfigError: a template, a key, a tokenizer or a certificate cannot be used.
        """
        models: list[ServedModel] = []
        backends: list[UpstreamBackend] = []
        sandboxes: list[Sandbox] = []
        if settings.upstreams:
            observer = UpstreamMetrics(metrics.registry)
            observer.watch(lambda: {model.name: each.endpoints.all for model, each in zip(models, backends)})
        try:
            for upstream in settings.upstreams:
                backends.append(open_upstream(upstream, settings.scheduler.request_timeout, observer))
                template: ChatTemplate | NoTemplate = NoTemplate()
                if isinstance(upstream, KServeUpstream):
                    sandbox, template = _template(settings, upstream)
                    sandboxes.append(sandbox)
                models.append(_served(settings, upstream, backends[-1], template))
        except BaseException:
            for sandbox in sandboxes:
                sandbox.close()
            raise
        return cls(models, backends, sandboxes)

    def start(self) -> None:
        """Begins the health checks. To be called on the event loop."""
        for backend in self.backends:
            backend.start()

    async def drain(self, seconds: float) -> None:
        """Waits until running requests have finished; after `seconds`, ends the others with an error."""
        await asyncio.gather(*(backend.drain(seconds) for backend in self.backends))

    def close(self) -> None:
        """Ends the sandboxes of their templates. Idempotent."""
        for sandbox in self.sandboxes:
            sandbox.close()


def _served(
    settings: Settings, upstream: AnyUpstream, backend: UpstreamBackend, template: ChatTemplate | NoTemplate
) -> ServedModel:
    return ServedModel(
        backend=backend,
        name=upstream.id,
        aliases=tuple(upstream.aliases),
        created=int(time.time()),
        fingerprint=f"{upstream.id}-bdh_batch-{__version__}",
        max_model_len=None,
        defaults=Defaults(),
        template=template,
        width=0,
        tokenizer_info={"tokenizer_class": type(backend.tokenizer).__name__},
        grammars=Grammars(
            NO_VOCABULARY, None, settings.limits.max_schema_bytes, settings.structured_output.cache_memory
        ),
        owner=OWNER,
    )


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
