"""The manifest of a model: the JSON document in which the registry keeps its source, config and files' checksums."""

from __future__ import annotations

import hashlib
import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.system.documents import LARGEST_JSON, Malformed, brief, listed, parse_json, read_text, unreadable

VERSION: Literal[1] = 1
MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
FILE_NAME = r"^\w[\w.-]*$"  # no path can be made of it
LONGEST_FILE_NAME = 200  # characters
Format = Literal["safetensors", "torch", "npz"]


class FileRecord(BaseModel):
    """One file of a model: its name, checksum and size."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = Field(pattern=FILE_NAME, max_length=LONGEST_FILE_NAME)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: NonNegativeInt  # bytes


class Manifest(BaseModel):
    """Describes a model of the registry.

    `entry` is the file to load, None where the folder as a whole is the model. `revision` is a repository's commit.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = VERSION
    id: str
    source: str
    revision: str | None = None
    format: Format
    entry: str | None = None
    files: tuple[FileRecord, ...] = Field(min_length=1)
    config: dict[str, Any]  # upstream's names; n_layer is absent where the files do not say it
    kind: str | None = None  # of checkpoint, and in words what distinguishes the model from upstream's
    variant: str | None = None
    created: datetime

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        names = [file.name for file in self.files]
        if len(set(names)) < len(names):
            raise ValueError("a file is listed twice")
        if self.entry is not None and self.entry not in names:
            raise ValueError("the entry is not one of the files")
        return self

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(file.size for file in self.files)

    @property
    def digest(self) -> str:
        """A hash of the files' names and contents, which names the snapshot's folder."""
        listing = sorted((file.name, file.sha256) for file in self.files)
        return hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def same_model(self, other: Manifest) -> bool:
        """Returns whether both have the same files and load the same way."""
        return self.digest == other.digest and self.entry == other.entry


def check_id(text: str) -> str:
    """Returns `text` if it can be a model's name. Names are names of files, too.

    Raises:
        ConfigError: it cannot.
    """
    if not is_id(text):
        rule = "letters, digits, '.', '_' and '-', 128 at most, that begin with a letter or a digit, without '..'"
        raise ConfigError(f"--id: {brief(text)} cannot be a model's name; it should be {rule}")
    return text


def is_id(text: str) -> bool:
    """Returns whether `text` can be a model's name."""
    return MODEL_ID.fullmatch(text) is not None and ".." not in text


def is_file_name(text: str) -> bool:
    """Returns whether `text` can be the name of a model's file, without any path."""
    return re.fullmatch(FILE_NAME, text) is not None and len(text) <= LONGEST_FILE_NAME and "\n" not in text


def read_manifest(file: Path, model_id: str) -> Manifest:
    """Reads and checks a model's manifest.

    Raises:
        CheckpointError: it is damaged, of another version, or another model's; the message names the file.
        FileNotFoundError
    """
    try:
        values = parse_json(read_text(file, LARGEST_JSON))
    except FileNotFoundError:
        raise
    except (OSError, Malformed) as error:
        raise unreadable(file, error) from error
    version = values.get("version") if isinstance(values, dict) else None
    if version != VERSION:
        raise CheckpointError(f"{file}: a manifest of version {brief(version)}; this program reads version {VERSION}")
    try:
        manifest = Manifest.model_validate(values)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc'])) or 'the document'}: {each['msg']}" for each in error.errors()]
        raise CheckpointError(f"{file}: {listed(problems)}") from error
    if manifest.id != model_id:
        raise CheckpointError(f"{file}: is the manifest of {brief(manifest.id)}")
    return manifest
