"""Finds the model that the settings name, and the name by which the API reports it."""

from __future__ import annotations

from pathlib import Path

from bdh_batch.registry.locate import Located, locate
from bdh_batch.settings import Settings


def bundled_model() -> Path:
    """Returns the path of the bundled model: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "models" / "bdh-shakespeare"
    return installed if installed.is_dir() else package.parent / "models" / "bdh-shakespeare"


def chosen_model(settings: Settings) -> Located:
    """Returns the model of the settings, whose files are not removed until it is closed.

    Raises:
        ConfigError: there is no such model.
    """
    return locate(settings.model.path or bundled_model())


def model_name(settings: Settings, located: Located) -> str:
    """Returns the name by which the API reports the model."""
    return settings.model.name or located.name
