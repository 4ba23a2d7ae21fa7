"""Where this program keeps files between runs. Knows nothing about what they are."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path

from bdh_batch.errors import ConfigError

VARIABLE = "BDH_CACHE"
NAME = "bdh-batch"


def cache_folder() -> Path:
    """The folder that the environment names, else the platform's for caches; it need not exist.

    Raises:
        ConfigError: there is neither, as the user has no home folder.
    """
    if chosen := os.environ.get(VARIABLE):
        return Path(os.path.abspath(chosen))
    folder = user_cache_path(NAME, appauthor=False)
    if not folder.is_absolute():
        raise ConfigError(f"{VARIABLE}: not set, and this user has no home folder; set it to a folder for models")
    return folder
