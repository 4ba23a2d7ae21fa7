"""The settings of a model in the caller's own program: a server's, without what is about connections and callers."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from bdh_batch import settings
from bdh_batch.errors import ConfigError
from bdh_batch.processes.model_settings import ModelSettings, models_of
from bdh_batch.settings import Settings

log = logging.getLogger(__name__)

ORIGIN = "argument"
OF_SERVERS = ("server", "models", "upstreams", "auth", "rate_limiting", "response_cache", "kserve", "telemetry")
OF_PROCESSES = ("engine.replicas", "engine.devices")
WHICH_MODEL = ("model.path",)  # is the first argument
# Arguments that vLLM's `LLM` has, and options here; besides, each option of the section `model` is one by its own name.
NAMES = {
    "max_num_seqs": "scheduler.max_running",
    "max_num_batched_tokens": "scheduler.prefill_tokens",
    "enable_prefix_caching": "prefix_cache.enabled",
    "chat_template": "chat.template",
}


def chosen(
    model: str | os.PathLike[str] | None, config: str | os.PathLike[str] | None, given: Mapping[str, Any]
) -> ModelSettings:
    """The model and its settings.

    Args:
        model: as `model.path`: a folder, a file, or the name of a registered model; None is the bundled one.
        config: a YAML file of options.
        given: sections of options, as `engine={"threads": 2}`, options of the section `model`, as `device="cpu"`, or
            `NAMES`. What a file and the environment say of a server's connections is not used.

    Raises:
        ConfigError, CheckpointError
    """
    overrides = [*_options(given)]
    if model is not None:
        overrides.append(("model.path", os.fspath(model)))
    resolved = settings.load(None if config is None else Path(config), overrides, ORIGIN)
    for text in resolved.warnings:
        log.warning("%s", text)
    return in_process(resolved.settings)


def in_process(given: Settings) -> ModelSettings:
    """The same settings for a model in this process alone. Raises ConfigError, CheckpointError."""
    defaults = Settings()
    own = given.model_copy(
        update={
            **{section: getattr(defaults, section) for section in OF_SERVERS},
            "engine": given.engine.model_copy(update={"replicas": None, "devices": []}),
            # Whoever computes here may say what goes first.
            "scheduler": given.scheduler.model_copy(update={"top_priority": -settings.MAX_PRIORITY}),
        }
    )
    [one] = models_of(own)
    return one


def _options(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    known = settings.options()
    for name, value in given.items():
        if name in OF_SERVERS:
            raise ConfigError(f"{name}: is about a server's connections; a model in this process has none")
        if name in Settings.model_fields and name != "model":
            if not isinstance(value, Mapping):
                text = f"should hold options, as in {name}={{'key': value}}"
                raise ConfigError(f"{name} ({ORIGIN}): {text}")
            yield from ((_own(f"{name}.{key}"), each) for key, each in value.items())
        elif name in NAMES:
            yield NAMES[name], value
        elif f"model.{name}" in known:
            yield _own(f"model.{name}"), value
        else:
            names = [*NAMES, *Settings.model_fields, *(each.partition(".")[2] for each in known if "model." in each)]
            near = difflib.get_close_matches(name, names, 1, 0)
            raise ConfigError(f"unknown argument {name[:128]!r}; did you mean {near[0]}?")


def _own(option: str) -> str:
    """Raises ConfigError: it says nothing of one model in this process."""
    if option in OF_PROCESSES:
        raise ConfigError(f"{option}: is about engine processes; the model is computed in this one")
    if option in WHICH_MODEL:
        raise ConfigError(f"{option}: give it as the first argument")
    return option
