"""The only module that wires packages together: settings to a server that runs, and its life from start to exit.

bind → listen (not ready) → load and warm the model → ready → SIGTERM → drain → close
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import ValidationError

from bdh_batch import __version__
from bdh_batch.backends.local import Engine as Computes, LocalBackend
from bdh_batch.engine.loading import LoadedEngine, attention_window, load_engine, start_worker
from bdh_batch.engine.worker import WORKER, Observer
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.http.app import create_app
from bdh_batch.http.auth.keys import KeyRing
from bdh_batch.http.gate import Gate, ServedModel
from bdh_batch.http.schema.requests import Defaults
from bdh_batch.http.transport.server import Server, listen, local_only, url_of
from bdh_batch.observability.metrics import Metrics
from bdh_batch.registry.locate import locate
from bdh_batch.settings import Auth, Generation, Sandbox as SandboxSettings, Settings
from bdh_batch.system.documents import read_json_beside
from bdh_batch.system.threads import calls_under_way, in_daemon_thread
from bdh_batch.text.chat import ChatTemplate, open_template
from bdh_batch.text.folder import TextComponents, load_text
from bdh_batch.text.grammar import Grammars, open_sandbox
from bdh_batch.text.sandbox import Sandbox
from bdh_batch.text.turns import QueueLimits
from bdh_batch.text.vocabulary import Vocabulary, setup_of, vocabulary_of

if TYPE_CHECKING:
    from bdh_batch.observability.spans import Spans

log = logging.getLogger(__name__)

T = TypeVar("T")

LOADER = "bdh-loader"  # the name of its thread
GENERATION_CONFIG = "generation_config.json"


def bundled_model() -> Path:
    """The model that comes with the package: inside an installed wheel, beside the package in a checkout."""
    package = Path(__file__).parent
    installed = package / "models" / "bdh-shakespeare"
    return installed if installed.is_dir() else package.parent / "models" / "bdh-shakespeare"


@dataclass(frozen=True)
class Loaded:
    """All that a server needs, ready. `grammars` is where they are tried out, None where there is no vocabulary."""

    text: TextComponents
    template: ChatTemplate
    templates: Sandbox
    vocabulary: Vocabulary | str  # or why there is none
    grammars: Sandbox | None
    defaults: Defaults
    engine: LoadedEngine

    def close(self) -> None:
        """Ends the sandboxes. Idempotent."""
        self.templates.close()
        if self.grammars is not None:
            self.grammars.close()


def load_all(settings: Settings, path: Path, load: Callable[[Settings, Path], LoadedEngine]) -> Loaded:
    """Reads what is quickly read first: what is wrong there is reported at once. Slow: call it off the event loop.

    Args:
        load: makes the engine.

    Raises:
        ConfigError, CheckpointError
    """
    folder = path if path.is_dir() else path.parent
    defaults = defaults_for(settings, folder)
    text = load_text(folder, settings.chat.template, settings.chat.parse_special_tokens)
    chosen, queue = settings.sandbox, queue_limits(settings.sandbox)
    templates, template = open_template(text.template, chosen.template_seconds, chosen.template_memory, queue)
    try:
        engine = load(settings, path)
        size = engine.model.config.vocab_size
        text = text.fit(size)
        vocabulary = vocabulary_of(text.tokenizer, size, text.eos)
        grammars = open_grammars(settings, text, vocabulary, size)
        return Loaded(text, template, templates, vocabulary, grammars, defaults, engine)
    except BaseException:
        templates.close()
        raise


def queue_limits(chosen: SandboxSettings) -> QueueLimits:
    return QueueLimits(chosen.processes, chosen.max_queued, chosen.max_queued_bytes, chosen.queue_seconds)


def open_grammars(settings: Settings, text: TextComponents, vocabulary: Vocabulary | str, size: int) -> Sandbox | None:
    """A sandbox for grammars, which gets ready beside all else; None where no grammar can be followed."""
    if isinstance(vocabulary, str):
        return None
    chosen, setup = settings.structured_output, setup_of(text.tokenizer, size, text.eos)
    return open_sandbox(setup, chosen.compile_seconds, chosen.grammar_memory, queue_limits(settings.sandbox))


def defaults_for(settings: Settings, folder: Path) -> Defaults:
    """The settings' generation defaults; where they are silent the model folder's, else OpenAI's."""
    chosen = suggested_generation(folder / GENERATION_CONFIG) | settings.generation.model_dump(exclude_none=True)
    return Defaults(**chosen)


def suggested_generation(file: Path) -> dict[str, Any]:
    """What a model folder's `generation_config.json` says, in the settings' names."""
    values = read_json_beside(file)
    try:
        suggested = {name: values.get(name) for name in ("temperature", "top_p", "top_k")}
        suggested["max_tokens"] = values.get("max_new_tokens")
        if values.get("do_sample") is False:
            suggested["temperature"] = 0.0
        return Generation(**suggested).model_dump(exclude_none=True)
    except ValidationError as error:
        problem = error.errors()[0]
        raise CheckpointError(f"{file}: {problem['loc'][0]}: {problem['msg']}") from error


def key_ring(auth: Auth) -> KeyRing | None:
    """The keys that are asked for, if any are. Raises ConfigError: there are none, or some are needed and not asked."""
    if auth.enabled:
        return KeyRing([key.get_secret_value() for key in auth.api_keys], auth.api_keys_file)
    for option in ("protect_metrics", "protect_docs"):
        if getattr(auth, option):
            raise ConfigError(f"auth.{option}: there are no keys to ask for unless auth.enabled is set")
    return None


def open_spans(settings: Settings, model_name: str) -> Spans | None:
    """None where no collector is set. Raises ConfigError: what speaks to it is not installed, or cannot be set up."""
    endpoint = settings.telemetry.otlp_endpoint
    if endpoint is None:
        return None
    try:
        from bdh_batch.observability.spans import Spans  # an extra: needed only where spans are exported
    except ImportError as error:
        text = f"OpenTelemetry is not installed ({error}); pip install 'bdh-batch[otel]'"
        raise ConfigError(f"telemetry.otlp_endpoint: {text}") from error
    return Spans(str(endpoint), model_name)


class Service:
    """One server, from its socket to its exit.

    Args:
        on_ready: is called with the base URL and the model's name once requests are welcome.
        load: makes the engine, off the event loop.
        start: has it compute, on the event loop.
    """

    def __init__(
        self,
        settings: Settings,
        on_ready: Callable[[str, str], None] = lambda url, model: None,
        load: Callable[[Settings, Path], LoadedEngine] = load_engine,
        start: Callable[[Settings, LoadedEngine, Observer], Computes] = start_worker,
    ) -> None:
        self._settings = settings
        self._on_ready = on_ready
        self._load = load
        self._start = start
        self._model = locate(settings.model.path or bundled_model())
        self._path = self._model.path
        self._name = settings.model.name or self._model.name
        self._gate = Gate()
        self._metrics = Metrics(self._name)
        self._spans: Spans | None = None
        self._stop = asyncio.Event()

    @property
    def stopping(self) -> bool:
        return self._stop.is_set()

    def stop(self) -> None:
        """Begins the drain."""
        self._stop.set()

    async def run(self) -> None:
        """Serves until `stop`.

        Raises:
            ConfigError, CheckpointError: the server could not start.
        """
        keys = key_ring(self._settings.auth)
        self._spans = open_spans(self._settings, self._name)
        listeners = listen(self._settings.server)
        app = create_app(self._settings, self._gate, self._metrics, keys, self._spans, local_only(listeners))
        server = Server(app, self._settings, self._metrics)
        server.start(listeners)
        watching = None if keys is None else asyncio.create_task(keys.watch())
        try:
            await self._serve(url_of(listeners, self._settings.server))
        finally:
            if watching is not None:
                watching.cancel()
            await server.close()
            if self._spans is not None:
                await self._spans.close()
            self._model.close()

    async def _serve(self, url: str) -> None:
        loading = in_daemon_thread(partial(load_all, self._settings, self._path, self._load), LOADER)
        stopped = asyncio.ensure_future(self._stop.wait())
        await asyncio.wait((loading, stopped), return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            return  # nothing has been promised to anyone yet
        loaded = loading.result()
        backend = self._open(loaded)
        try:
            self._on_ready(url, self._name)
            await stopped
            self._gate.drain()
            log.info("draining for up to %.0f s", self._settings.server.drain_seconds)
            await backend.drain(self._settings.server.drain_seconds)
        finally:
            loaded.close()
            await asyncio.to_thread(backend.close)

    def _open(self, loaded: Loaded) -> LocalBackend:
        settings, engine, text, chosen = self._settings, loaded.engine, loaded.text, self._settings.scheduler
        config = engine.model.config
        observer = self._metrics if self._spans is None else self._spans.beside(self._metrics)
        worker = self._start(settings, engine, observer)
        backend = LocalBackend(
            worker,
            text.tokenizer,
            config.vocab_size,
            settings.model.max_model_len,
            settings.health.stall_seconds,
            chosen.queue_timeout,
            chosen.request_timeout,
            text.eos,
        )
        self._metrics.watch(lambda: worker.load)
        self._metrics.describe_cache(
            num_gpu_blocks=engine.slots,  # states on the device, which without a GPU is main memory
            num_cpu_blocks=engine.host_slots,
            block_size=settings.model.max_model_len,  # tokens that a state can stand for
            cache_dtype=settings.engine.state_dtype,
            enable_prefix_caching=settings.prefix_cache.enabled,
            sliding_window=attention_window(settings.model.attention_window, config) or None,
        )
        if loaded.grammars is not None:
            loaded.grammars.warm_up()
        sandboxes = {"templates": loaded.templates, "grammars": loaded.grammars}
        self._metrics.watch_sandboxes(
            {work: partial(getattr, sandbox, "load") for work, sandbox in sandboxes.items() if sandbox is not None}
        )
        gc.collect()
        gc.freeze()  # what is alive now stays: the collector need not walk it again
        self._gate.open(
            ServedModel(
                backend=backend,
                name=self._name,
                aliases=tuple(settings.model.aliases),
                created=int(self._path.stat().st_mtime),
                fingerprint=f"{self._name}-bdh_batch-{__version__}",
                max_model_len=settings.model.max_model_len,
                defaults=loaded.defaults,
                template=loaded.template,
                width=config.n_embd,
                tokenizer_info=text.info() | {"vocab_size": config.vocab_size},
                grammars=Grammars(
                    loaded.vocabulary,
                    loaded.grammars,
                    settings.limits.max_schema_bytes,
                    settings.structured_output.cache_memory,
                ),
            )
        )
        return backend


def threads_left() -> bool:
    """Whether a thread that could not be stopped still runs."""
    return calls_under_way() or any(thread.name in (LOADER, WORKER) for thread in threading.enumerate())


async def serve(
    settings: Settings,
    on_ready: Callable[[str, str], None],
    load: Callable[[Settings, Path], LoadedEngine] = load_engine,
    start: Callable[[Settings, LoadedEngine, Observer], Computes] = start_worker,
) -> None:
    """Runs a server until SIGTERM or SIGINT; a second signal does not wait for the drain."""
    service = Service(settings, on_ready, load, start)
    loop = asyncio.get_running_loop()
    running = asyncio.ensure_future(service.run())

    def on_signal() -> None:
        if service.stopping:
            running.cancel()
        service.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)
    with contextlib.suppress(asyncio.CancelledError):
        await running
