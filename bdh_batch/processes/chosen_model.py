"""Which model the settings name: where it lies, and what the API calls it."""

from __future__ import annotations

from pathlib import Path

from bdh_batch.registry.locate import Located, locate
from bdh_batch.settings import Settings


def bundled_model() -> Path:
    """The model that comes with the package: inside an installed wheel, beside the package in a checkout."""
    package = Path(__file__).parent.parent
    installed = package / "models" / "bdh-shakespeare"
    return installed if installed.is_dir() else package.parent / "models" / "bdh-shakespeare"


def chosen_model(settings: Settings) -> Located:
    """It is held until it is closed: nothing of it is removed meanwhile. Raises ConfigError: there is none."""
    return locate(settings.model.path or bundled_model())


def model_name(settings: Settings, located: Located) -> str:
    return settings.model.name or located.name
