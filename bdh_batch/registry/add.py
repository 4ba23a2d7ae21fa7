"""Adds a model: has its files brought, checks that they are one that can be served, and publishes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bdh_batch.checkpoint.checkpoint import open_checkpoint
from bdh_batch.checkpoint.convert import BESIDE, TOKENIZER
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS, weight_map
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.registry.download import Downloads
from bdh_batch.registry.files import CHUNK, Allowance, Staged, copy, explained
from bdh_batch.registry.manifest import FileRecord, Manifest, check_id, is_file_name
from bdh_batch.registry.origins import Origin, open_origin
from bdh_batch.registry.store import Store, already_there
from bdh_batch.system.documents import brief, listed, read_json, shown

SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_PARTS = 1000  # files that an index may list
WEIGHTS_ALONE = ""  # the name that a checksum without one is kept by


@dataclass(frozen=True, slots=True)
class Terms:
    """On which terms a model is added.

    Args:
        most_bytes: of all files together.
        sha256: of files, by name; that of the weights, where they are one file, by `WEIGHTS_ALONE`.
        allow_pickle: whether torch files are taken from a URL or the Hub.
        replace: whether another model of the same name is.
    """

    most_bytes: int
    sha256: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    replace: bool = False


def checksum(text: str) -> tuple[str, str]:
    """'HEX' or 'NAME=HEX' to what `Terms.sha256` has.

    Raises:
        ConfigError
    """
    name, _, digest = text.rpartition("=")
    if not SHA256.fullmatch(digest.lower()) or (name and not is_file_name(name)):
        raise ConfigError(f"--sha256: 64 hexadecimal digits are expected, or NAME= and them, not {brief(text)}")
    return name or WEIGHTS_ALONE, digest.lower()


def add(store: Store, source: str, model_id: str, terms: Terms) -> Manifest:
    """Adds the model at a path, a URL or `hf:ORG/NAME[@REV]`, whole or not at all.

    Raises:
        ConfigError: the name, the source or a checksum is not one.
        CheckpointError: the source cannot be had, is not a model that can be served, is not what the terms say, or
            the name is taken. Only downloads that can be resumed are left behind.
    """
    check_id(model_id)
    with explained(store.root):
        if model_id in store and not terms.replace:
            raise already_there(store.read(model_id))
        with store.staging() as folder, Downloads(store.downloads) as downloads:
            origin = open_origin(source, downloads)
            gathering = Gathering(origin, store, folder / "files", terms)
            gathering.gather()
            config = _config(gathering.files, origin, folder / "model")
            return store.publish(_manifest(model_id, origin, gathering.files, config), gathering.files, terms.replace)


class Gathering:
    """Brings the files of one model: its weights, its config, and what the loader looks for beside them."""

    def __init__(self, origin: Origin, store: Store, folder: Path, terms: Terms) -> None:
        self._origin, self._store, self._folder, self._terms = origin, store, folder, terms
        self._allowance = Allowance(terms.most_bytes)
        self.files: dict[str, Staged] = {}
        folder.mkdir()

    def gather(self) -> None:
        """
        Raises:
            ConfigError, CheckpointError, OSError
        """
        weights = self._weights()
        if weights.endswith(".json"):
            self._parts(weights)
        for name in (CONFIG, *BESIDE):
            self._bring(name)
        if weights.startswith(WEIGHTS) and self._origin.entry is None and CONFIG not in self.files:
            raise CheckpointError(f"{self._origin.source} has no {CONFIG}")
        if unknown := sorted(self._terms.sha256.keys() - self.files.keys() - {WEIGHTS_ALONE}):
            raise ConfigError(f"--sha256: the model has no {listed(map(shown, unknown), ', ')}")

    def _weights(self) -> str:
        tried, pickled = [], []
        for name in self._origin.candidates():
            if _is_pickle(name) and self._origin.remote and not self._terms.allow_pickle:
                pickled.append(name)
            elif self._bring(name, WEIGHTS_ALONE):
                return name
            else:
                tried.append(name)
        if pickled and not tried:
            raise self._pickled(pickled)
        more = f"; {', '.join(pickled)} is looked for with --allow-pickle only" if pickled else ""
        raise CheckpointError(f"{self._origin.source} has no {' or '.join(tried)}{more}")

    def _parts(self, index: str) -> None:
        if WEIGHTS_ALONE in self._terms.sha256:
            raise ConfigError("--sha256: the weights are in several files; give NAME=HEX for each")
        try:
            names = sorted(set(weight_map(self.files[index].path).values()))
        except CheckpointError as error:
            raise CheckpointError(f"{self._origin.source}: {index} is not an index of weights") from error
        if len(names) > MOST_PARTS:
            raise CheckpointError(
                f"{self._origin.source}: {index} lists {len(names):,} files, more than {MOST_PARTS:,}"
            )
        for name in names:
            self._check_name(name)
        pickled = [name for name in names if _is_pickle(name)]
        if pickled and self._origin.remote and not self._terms.allow_pickle:
            raise self._pickled(pickled)
        for name in names:
            if not self._bring(name):
                raise CheckpointError(f"{self._origin.source} has no {name}, which {index} lists")

    def _pickled(self, names: list[str]) -> CheckpointError:
        text = f"its weights are a pickle ({listed(names, ', ')}), which is not taken from elsewhere"
        return CheckpointError(f"{self._origin.source}: {text}; --allow-pickle takes it if you trust the source")

    def _bring(self, name: str, also_known_as: str | None = None) -> bool:
        """Has the file, if the origin does; whether it has."""
        if name in self.files:
            return True
        self._check_name(name)
        expected = self._terms.sha256.get(name)
        if expected is None and also_known_as is not None and not name.endswith(".json"):
            expected = self._terms.sha256.get(also_known_as)
        found = self._stored(name, expected) or self._origin.bring(name, expected, self._folder, self._allowance)
        if found is None:
            return False
        self._allowance.take(found.size)
        self.files[name] = found
        return True

    def _stored(self, name: str, sha256: str | None) -> Staged | None:
        """A copy of what the registry has already, if that is still right."""
        if sha256 is None or not (blob := self._store.blob(sha256)).is_file():
            return None
        found = copy(blob, self._folder / name, self._allowance)
        return found if found.sha256 == sha256 else None

    def _check_name(self, name: str) -> None:
        if not is_file_name(name):
            raise CheckpointError(f"{self._origin.source}: {brief(name)} cannot be the name of a model's file")


def _manifest(model_id: str, origin: Origin, files: Mapping[str, Staged], config: dict[str, Any]) -> Manifest:
    return Manifest(
        id=model_id,
        source=origin.source,
        revision=origin.revision,
        format="torch" if any(map(_is_pickle, files)) else "safetensors",
        entry=origin.entry,
        files=tuple(FileRecord(name=name, sha256=file.sha256, size=file.size) for name, file in sorted(files.items())),
        config=config,
        created=datetime.now(UTC).replace(microsecond=0),
    )


def _config(files: Mapping[str, Staged], origin: Origin, model: Path) -> dict[str, Any]:
    """The model's config, in upstream's names; `model` is a folder to make, where the loader finds the files.

    Raises:
        CheckpointError: the loader refuses it.
    """
    model.mkdir()
    for name, file in files.items():
        (model / name).symlink_to(file.path)
    try:
        _check_documents(model)
        checkpoint = open_checkpoint(model / origin.entry if origin.entry else model)
    except CheckpointError as error:
        raise CheckpointError(f"{origin.source}: {str(error).replace(f'{model}/', '')}") from error
    config = checkpoint.config.to_dict()
    return config if checkpoint.layers_known else {name: value for name, value in config.items() if name != "n_layer"}


def _check_documents(model: Path) -> None:
    """Some web servers send a page of apology for a file that they do not have, and call it a success."""
    for file in sorted(model.glob("*.json")):
        if file.name != TOKENIZER:
            read_json(file)
            continue
        with file.open("rb") as stream:  # too large to be read for this alone
            if not stream.read(CHUNK).lstrip().startswith(b"{"):
                raise CheckpointError(f"{file}: not JSON")


def _is_pickle(name: str) -> bool:
    """Whether the loader unpickles a file of this name."""
    return not name.endswith((".safetensors", ".json", ".jinja"))
