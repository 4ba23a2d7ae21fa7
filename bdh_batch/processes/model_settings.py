"""Finds the models that the settings name, and gives each the settings that it has to itself."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path

from bdh_batch.errors import ConfigError
from bdh_batch.registry.locate import Located, locate
from bdh_batch.settings import ModelEntry, Settings

OF_MODEL = {"path", "aliases", "device", "dtype", "attention_window", "max_model_len"} | {
    *("layers", "norm", "rope_layout", "rope_theta", "rotary_dim", "min_latent_steps", "max_latent_steps")
}
OF_ENGINE = {"state_dtype", "state_memory", "state_memory_share", "replicas", "devices", "threads"}
ONE_MODEL = {"path", "name", "aliases"}  # options of the section `model` that say which model it is


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """One of the models of a server.

    Args:
        name: by which the API reports it.
        settings: with the sections `model`, `engine` and `chat` as they are for this model.
        keep_alive: seconds without a request after which it is unloaded.
    """

    name: str
    settings: Settings
    on_demand: bool = False
    keep_alive: float = math.inf


def bundled_model() -> Path:
    """Returns the path of the bundled model: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "models" / "bdh-shakespeare"
    return installed if installed.is_dir() else package.parent / "models" / "bdh-shakespeare"


def chosen_model(settings: Settings) -> Located:
    """Returns the model of the settings, whose files are not removed until it is closed.

    Raises:
        ConfigError, CheckpointError: there is no such model.
    """
    return locate(settings.model.path or bundled_model())


def models_of(settings: Settings) -> list[ModelSettings]:
    """Returns the models of a server: those that `models` lists, else the one of the section `model`.

    Raises:
        ConfigError, CheckpointError: the one model does not exist, or there are options for one beside a list.
    """
    if settings.models:
        if beside := sorted(ONE_MODEL & settings.model.model_fields_set):
            raise ConfigError(f"model.{beside[0]}: leave it out where `models` are listed")
        return [_of_entry(settings, entry) for entry in settings.models]
    if settings.server.max_loaded_models is not None:
        raise ConfigError("server.max_loaded_models: there is one model only; list several in `models`")
    with contextlib.closing(chosen_model(settings)) as located:
        return [ModelSettings(settings.model.name or located.name, settings)]


def _of_entry(settings: Settings, entry: ModelEntry) -> ModelSettings:
    if entry.load == "warm" and "keep_alive" in entry.model_fields_set:
        raise ConfigError(f"models ({entry.id}): keep_alive: a warm model stays loaded; it is for load: on_demand")
    if entry.devices and "device" in entry.model_fields_set:
        raise ConfigError(f"models ({entry.id}): device: devices says where its engines compute; leave one of them out")
    given = {name: getattr(entry, name) for name in entry.model_fields_set}
    model = {name: given[name] for name in OF_MODEL & given.keys()}
    engine = {name: given[name] for name in OF_ENGINE & given.keys()}
    if "state_memory_share" in engine:
        engine.setdefault("state_memory", None)  # which would go before it
    chat = {"template": entry.template} if "template" in given else {}
    own = settings.model_copy(
        update={
            "model": settings.model.model_copy(update={**model, "name": entry.id}),
            "engine": settings.engine.model_copy(update=engine),
            "chat": settings.chat.model_copy(update=chat),
        }
    )
    on_demand = entry.load == "on_demand"
    return ModelSettings(entry.id, own, on_demand, entry.keep_alive if on_demand else math.inf)
