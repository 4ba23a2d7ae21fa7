"""Finds the files that `model.path` names: an existing path, else a model of the registry."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from bdh_batch.errors import CheckpointError
from bdh_batch.registry.files import explained
from bdh_batch.registry.locks import share
from bdh_batch.registry.manifest import is_id
from bdh_batch.registry.store import Store
from bdh_batch.system.cache_folder import cache_folder
from bdh_batch.system.documents import listed, shown

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Located:
    """A model's files and its name. Until it is closed, `model prune` does not delete the files."""

    path: Path
    name: str
    _lock: int | None = None  # a descriptor

    def close(self) -> None:
        """Unlocks the files. To be called once."""
        if self._lock is not None:
            os.close(self._lock)


def locate(path: Path, option: str = "model.path") -> Located:
    """Returns the model at `path`, or that of this name; a path that is neither is left to the loader to refuse.

    Args:
        option: the option that `path` comes from, for errors.

    Raises:
        CheckpointError: there is no such model, or its files are missing or damaged.
    """
    if os.path.lexists(path) or not is_id(str(path)):
        try:
            return Located(path, path.resolve().name)
        except (OSError, ValueError, RuntimeError) as error:  # too long, a NUL character, links in a circle
            raise CheckpointError(f"{option}: {shown(str(path))} cannot be a path ({error})") from error
    root = cache_folder()
    with explained(root):
        store, name = Store(root), str(path)
        if name not in store:
            others = store.names()
            known = f", and none of that name in the registry, which has: {listed(others, ', ')}" if others else ""
            raise CheckpointError(f"{option}: there is no model at {shown(path)}{known}")
        manifest = store.read(name)
        folder = store.snapshot(manifest)
        located = Located(folder / manifest.entry if manifest.entry else folder, name, _share(folder, name))
        if problems := store.problems(manifest, hashing=False):
            located.close()
            raise CheckpointError(f"{option}: {name} is damaged: {listed(problems)}; add it again, with --force")
        return located


def _share(folder: Path, name: str) -> int | None:
    try:
        return share(folder)
    except FileNotFoundError as error:
        raise CheckpointError(f"model.path: the files of {name} are gone; add it again, with --force") from error
    except OSError as error:  # a file system without locks
        log.warning("%s cannot be locked (%s): do not prune while it is served", folder, error.strerror)
        return None
