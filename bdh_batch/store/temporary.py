"""The folder of a store that has none: all that the process that starts a server's others needs of a store."""

from __future__ import annotations

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Store as Chosen
from bdh_batch.store.folders import LockedFolder, remove_abandoned, roomy_folder

TEMPORARY = "bdh-batch-store-"  # how such folders begin


def temporary_folder(chosen: Chosen) -> LockedFolder:
    """Makes the folder of a store that ends with its server, or of one that has all else elsewhere, and removes those
    of servers that were killed.

    Raises:
        ConfigError
    """
    _check_places(chosen)
    parent = roomy_folder(chosen.max_bytes)
    try:
        remove_abandoned(parent, TEMPORARY)
        return LockedFolder.make(parent, TEMPORARY)
    except OSError as error:
        raise ConfigError(f"store.path: {parent}: no temporary folder can be made there ({error})") from error


def _check_places(chosen: Chosen) -> None:
    """Raises ConfigError: without a folder, records and files of states would not be kept for the same time."""
    if chosen.url is not None and chosen.states_url is None:
        text = "with store.url, states need store.states_url, or a folder that all servers share"
        raise ConfigError(f"store.path: {text}")
    if chosen.url is None and chosen.states_url is not None:
        text = "without store.url and store.path, records end with the server, and states would stay; set one of them"
        raise ConfigError(f"store.states_url: {text}")
