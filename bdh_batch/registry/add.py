"""Adds a model to the registry: fetches its files, checks that they can be served, and publishes them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from bdh_batch.checkpoint.checkpoint import Checkpoint, open_checkpoint
from bdh_batch.checkpoint.convert import BESIDE, TOKENIZER
from bdh_batch.checkpoint.files import CONFIG, WEIGHTS, weight_map
from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.registry.download import Downloads
from bdh_batch.registry.files import CHUNK, Allowance, Staged, copy, explained
from bdh_batch.registry.manifest import FileRecord, Format, Manifest, check_id, is_file_name
from bdh_batch.registry.origins import Origin, open_origin
from bdh_batch.registry.store import Store, already_there
from bdh_batch.system.documents import brief, listed, read_json, shown

SHA256 = re.compile(r"[0-9a-f]{64}")
MOST_PARTS = 1000  # files that an index may list
WEIGHTS_ALONE = ""  # the key of a checksum without a file name


@dataclass(frozen=True, slots=True)
class AddOptions:
    """The options of adding a model: what it has to be, and what is allowed.

    Args:
        most_bytes: the largest size of all files together.
        sha256: expected checksums by file name; that of weights in one file may be at `WEIGHTS_ALONE`.
        allow_pickle: whether torch files are accepted from a URL or the Hub.
        replace: whether another model of the same name is replaced.
    """

    most_bytes: int
    sha256: Mapping[str, str] = field(default_factory=dict)
    allow_pickle: bool = False
    replace: bool = False


def checksum(text: str) -> tuple[str, str]:
    """Parses 'HEX' or 'NAME=HEX' into an item of `AddOptions.sha256`.

    Raises:
        ConfigError: the text is neither.
    """
    name, _, digest = text.rpartition("=")
    if not SHA256.fullmatch(digest.lower()) or (name and not is_file_name(name)):
        raise ConfigError(f"--sha256: 64 hexadecimal digits are expected, or NAME= and them, not {brief(text)}")
    return name or WEIGHTS_ALONE, digest.lower()


def add(store: Store, source: str, model_id: str, options: AddOptions) -> Manifest:
    """Adds the model at a path, a URL or `hf:ORG/NAME[@REV]`, whole or not at all.

    Raises:
        ConfigError: the name, the source or a checksum is not valid.
        CheckpointError: the source cannot be fetched, is not a model that can be served, does not fit the options, or
            the name is taken. Only downloads that can be resumed are left behind.
    """
    check_id(model_id)
    with explained(store.root):
        if model_id in store and not options.replace:
            raise already_there(store.read(model_id))
        with store.staging() as folder, Downloads(store.downloads) as downloads:
            origin = open_origin(source, downloads)
            collector = FileCollector(origin, store, folder / "files", options)
            collector.collect()
            checkpoint = _checkpoint(collector.files, origin, folder / "model")
            manifest = _manifest(model_id, origin, collector.files, checkpoint)
            return store.publish(manifest, collector.files, options.replace)


class FileCollector:
    """Fetches the files of one model: its weights, its config, and what the loader looks for beside them."""

    def __init__(self, origin: Origin, store: Store, folder: Path, options: AddOptions) -> None:
        self._origin, self._store, self._folder, self._options = origin, store, folder, options
        self._allowance = Allowance(options.most_bytes)
        self.files: dict[str, Staged] = {}
        folder.mkdir()

    def collect(self) -> None:
        """Fetches all files into `files`.

        Raises:
            ConfigError, CheckpointError, OSError
        """
        weights = self._weights()
        if weights.endswith(".json"):
            self._parts(weights)
        for name in (CONFIG, *BESIDE):
            self._fetch(name)
        if weights.startswith(WEIGHTS) and self._origin.entry is None and CONFIG not in self.files:
            raise CheckpointError(f"{self._origin.source} has no {CONFIG}")
        if unknown := sorted(self._options.sha256.keys() - self.files.keys() - {WEIGHTS_ALONE}):
            raise ConfigError(f"--sha256: the model has no {listed(map(shown, unknown), ', ')}")

    def _weights(self) -> str:
        tried, pickled = [], []
        for name in self._origin.candidates():
            if _is_pickle(name) and self._origin.remote and not self._options.allow_pickle:
                pickled.append(name)
            elif self._fetch(name, WEIGHTS_ALONE):
                return name
            else:
                tried.append(name)
        if pickled and not tried:
            raise self._pickled(pickled)
        more = f"; {', '.join(pickled)} is looked for with --allow-pickle only" if pickled else ""
        raise CheckpointError(f"{self._origin.source} has no {' or '.join(tried)}{more}")

    def _parts(self, index: str) -> None:
        if WEIGHTS_ALONE in self._options.sha256:
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
        if pickled and self._origin.remote and not self._options.allow_pickle:
            raise self._pickled(pickled)
        for name in names:
            if not self._fetch(name):
                raise CheckpointError(f"{self._origin.source} has no {name}, which {index} lists")

    def _pickled(self, names: list[str]) -> CheckpointError:
        text = f"its weights are a pickle ({listed(names, ', ')}), which is not taken from elsewhere"
        return CheckpointError(f"{self._origin.source}: {text}; --allow-pickle takes it if you trust the source")

    def _fetch(self, name: str, also_known_as: str | None = None) -> bool:
        """Fetches a file and returns whether the origin has it."""
        if name in self.files:
            return True
        self._check_name(name)
        expected = self._options.sha256.get(name)
        if expected is None and also_known_as is not None and not name.endswith(".json"):
            expected = self._options.sha256.get(also_known_as)
        found = self._stored(name, expected) or self._origin.fetch(name, expected, self._folder, self._allowance)
        if found is None:
            return False
        self._allowance.take(found.size)
        self.files[name] = found
        return True

    def _stored(self, name: str, sha256: str | None) -> Staged | None:
        """Returns a copy of the registry's file with that checksum; None where there is none, or it is damaged."""
        if sha256 is None or not (blob := self._store.blob(sha256)).is_file():
            return None
        found = copy(blob, self._folder / name, self._allowance)
        return found if found.sha256 == sha256 else None

    def _check_name(self, name: str) -> None:
        if not is_file_name(name):
            raise CheckpointError(f"{self._origin.source}: {brief(name)} cannot be the name of a model's file")


def _manifest(model_id: str, origin: Origin, files: Mapping[str, Staged], checkpoint: Checkpoint) -> Manifest:
    return Manifest(
        id=model_id,
        source=origin.source,
        revision=origin.revision,
        format=_format(files),
        entry=origin.entry,
        files=tuple(FileRecord(name=name, sha256=file.sha256, size=file.size) for name, file in sorted(files.items())),
        config=_config(checkpoint),
        kind=checkpoint.kind,
        variant=checkpoint.variant(),
        created=datetime.now(UTC).replace(microsecond=0),
    )


def _format(files: Collection[str]) -> Format:
    if any(map(_is_pickle, files)):
        return "torch"
    return "npz" if any(name.endswith(".npz") for name in files) else "safetensors"


def _config(checkpoint: Checkpoint) -> dict[str, Any]:
    """The model's config, by upstream's names."""
    config = checkpoint.config.to_dict()
    return config if checkpoint.layers_known else {name: value for name, value in config.items() if name != "n_layer"}


def _checkpoint(files: Mapping[str, Staged], origin: Origin, model: Path) -> Checkpoint:
    """Returns what the loader finds in the files, after it has checked them.

    Args:
        model: a folder to make, in which the loader finds the files.

    Raises:
        CheckpointError: the loader refuses the files.
    """
    model.mkdir()
    for name, file in files.items():
        (model / name).symlink_to(file.path)
    try:
        _check_documents(model)
        return open_checkpoint(model / origin.entry if origin.entry else model)
    except CheckpointError as error:
        raise CheckpointError(f"{origin.source}: {str(error).replace(f'{model}/', '')}") from error


def _check_documents(model: Path) -> None:
    """Checks that JSON files are JSON: some web servers send an error page with status 200."""
    for file in sorted(model.glob("*.json")):
        if file.name != TOKENIZER:
            read_json(file)
            continue
        with file.open("rb") as stream:  # too large to be read for this alone
            if not stream.read(CHUNK).lstrip().startswith(b"{"):
                raise CheckpointError(f"{file}: not JSON")


def _is_pickle(name: str) -> bool:
    """Returns whether the loader unpickles a file of this name."""
    return not name.endswith((".safetensors", ".npz", ".json", ".jinja"))
