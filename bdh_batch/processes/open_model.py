"""A model that this process serves: what its text needs, beside the engines that compute it."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from bdh_batch import __version__
from bdh_batch.backends.base import Backend
from bdh_batch.http.gate import ModelInfo, ServedModel
from bdh_batch.observability.metrics import Metrics
from bdh_batch.processes.components import Components, ModelFolder
from bdh_batch.processes.engines import LOADER, EngineInfo, Engines
from bdh_batch.processes.model_settings import ModelSettings
from bdh_batch.registry.locate import Located
from bdh_batch.system.threads import in_daemon_thread
from bdh_batch.text import chat
from bdh_batch.text.grammar import Grammars


class OpenModel:
    """A model that is loaded, until it is closed."""

    def __init__(
        self,
        served: ServedModel,
        located: Located,
        components: Components,
        engines: Engines,
        metrics: Metrics,
    ) -> None:
        self.served = served
        self.backend = served.backend
        self._located = located
        self._components = components
        self._engines = engines
        self._metrics = metrics
        sandboxes = {"templates": components.templates, "grammars": components.grammars}
        loads = {work: partial(getattr, sandbox, "load") for work, sandbox in sandboxes.items() if sandbox is not None}
        metrics.watch_sandboxes(served.name, loads)

    @classmethod
    async def load(
        cls, model: ModelSettings, info: ModelInfo, located: Located, engines: Engines, metrics: Metrics
    ) -> OpenModel:
        """Reads what the model's text needs, and waits for its engines.

        Args:
            located: its files; closed when the model is, or cannot be loaded.

        Raises:
            ConfigError, CheckpointError: it cannot be loaded.
        """
        try:
            folder = await in_daemon_thread(partial(ModelFolder.of, model.settings, located.path), LOADER)
        except BaseException:
            located.close()
            raise
        chat.warm_up(folder.templates)
        try:
            facts = await engines.load()
            components = await in_daemon_thread(partial(folder.fit, facts.vocab_size, facts.latent_steps), LOADER)
        except BaseException:
            engines.close()
            located.close()
            await asyncio.to_thread(folder.close)
            raise
        backend = engines.open(components)
        revision = await in_daemon_thread(partial(revision_of, model, located.path), LOADER)
        served = _served(model, info, located.path, revision, backend, components, facts, engines.compiles_grammars)
        if components.grammars is not None:
            components.grammars.warm_up()
        return cls(served, located, components, engines, metrics)

    def engines(self) -> Sequence[Mapping[str, object]]:
        """Returns what is known of each engine process."""
        return self._engines.states()

    async def close(self) -> None:
        """Ends what was started for it. To be called once."""
        self._metrics.watch_sandboxes(self.served.name, {})
        self._engines.close()
        await asyncio.to_thread(self._components.close)
        await asyncio.to_thread(self.backend.close)
        self._located.close()


def revision_of(model: ModelSettings, path: Path) -> str:
    """Returns a hash of a model's settings, and of the names, sizes and times of its files."""
    digest = hashlib.blake2b(__version__.encode(), digest_size=16)
    for section in ("model", "engine", "generation", "chat"):
        digest.update(getattr(model.settings, section).model_dump_json().encode())
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        status = file.stat()
        digest.update(f"{file.name} {status.st_size} {status.st_mtime_ns}\0".encode())
    return digest.hexdigest()


def _served(
    model: ModelSettings,
    info: ModelInfo,
    path: Path,
    revision: str,
    backend: Backend,
    components: Components,
    facts: EngineInfo,
    compiled_elsewhere: bool,
) -> ServedModel:
    settings = model.settings
    return ServedModel(
        info=info,
        revision=revision,
        backend=backend,
        system_fingerprint=f"{info.name}-bdh_batch-{__version__}",
        fingerprint=fingerprint_of(facts, components),
        defaults=components.defaults,
        template=components.template,
        width=facts.width,
        tokenizer_info=components.text.info() | {"vocab_size": facts.vocab_size},
        grammars=Grammars(
            components.vocabulary,
            components.grammars,
            settings.limits.max_schema_bytes,
            settings.structured_output.cache_memory,
            elsewhere=compiled_elsewhere,
        ),
        layout=facts.layout,
        folder=path if path.is_dir() else path.parent,
    )


def fingerprint_of(facts: EngineInfo, components: Components) -> str:
    """Returns a hash of all that decides what a request generates: the engine, the tokenizer, the defaults."""
    parts = (facts.fingerprint, components.text.info(), components.defaults)
    return hashlib.blake2b(repr(parts).encode(), digest_size=16).hexdigest()
