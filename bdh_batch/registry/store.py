"""The registry's folder: its layout, changes that happen whole or not at all, and the check of its files.

    manifests/NAME.json       what is known of a model
    blobs/SHA256              the files, by their content: models may share them
    snapshots/DIGEST/FILE     what is loaded: links to the blobs, by the names that the loader looks for
    downloads/, staging/      what is not yet part of a model

A process that changes manifests, blobs or snapshots locks the folder itself. Servers lock their snapshot, shared.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bdh_batch.errors import CheckpointError
from bdh_batch.registry.files import Staged, hash_of, write_whole
from bdh_batch.registry.locks import locked, locked_if_free
from bdh_batch.registry.manifest import FileRecord, Manifest, is_id, read_manifest
from bdh_batch.system.documents import brief, listed, shown
from bdh_batch.system.durable import sync_folder

READ_ONLY = 0o444


@dataclass(frozen=True, slots=True)
class Pruned:
    """The result of `Store.prune`: files and bytes that were deleted, and models that stay as servers use them."""

    files: int
    size: int
    in_use: int


class Store:
    """The registry in a folder, which is made when the first model is added."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.downloads = root / "downloads"
        self._manifests = root / "manifests"
        self._blobs = root / "blobs"
        self._snapshots = root / "snapshots"
        self._staging = root / "staging"

    # Reading

    def names(self) -> list[str]:
        """Returns the names of all models, sorted."""
        files = self._manifests.glob("*.json")
        return sorted(name for file in files if is_id(name := file.name.removesuffix(".json")))

    def __contains__(self, name: str) -> bool:
        return is_id(name) and self._manifest(name).is_file()

    def read(self, name: str) -> Manifest:
        """Returns the manifest of a model.

        Raises:
            CheckpointError: there is no such model (the message lists the others), or its manifest is damaged.
        """
        manifest = self._read_if_there(name)
        if manifest is None:
            raise self._unknown(name)
        return manifest

    def _unknown(self, name: str) -> CheckpointError:
        names = self.names()
        rest = f"it has: {listed(names, ', ')}" if names else "it is empty; `bdh-batch model add` adds one"
        return CheckpointError(f"the registry has no model {brief(name)}: {rest}")

    def snapshot(self, manifest: Manifest) -> Path:
        """Returns the folder that contains the model's files."""
        return self._snapshots / manifest.digest

    def blob(self, sha256: str) -> Path:
        """Returns the path of the file with that checksum, whether it exists or not."""
        return self._blobs / sha256

    def in_use(self, manifest: Manifest) -> bool:
        """Returns whether a server uses the model."""
        folder = self.snapshot(manifest)
        with locked_if_free(folder) as free:
            return folder.is_dir() and not free

    # Changing it

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """Makes a folder for files that are to be published, and deletes it at the end."""
        folder = self._staging / secrets.token_hex(8)
        with locked(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, manifest: Manifest, staged: Mapping[str, Staged], replace: bool) -> Manifest:
        """Makes a model of staged files, whole or not at all, and returns its manifest.

        Raises:
            CheckpointError: there is another model of this name.
            OSError: nothing of the model is left behind.
        """
        with locked(self.root):
            there = self._read_if_there(manifest.id) if not replace else None
            if there is not None:
                if there.same_model(manifest):
                    return there
                raise already_there(there)
            with contextlib.ExitStack() as undo:
                self._move_blobs(staged, undo)
                self._link(manifest, undo)
                self._manifests.mkdir(exist_ok=True)
                write_whole(self._manifest(manifest.id), (manifest.model_dump_json(indent=2) + "\n").encode())
                undo.pop_all()
        return manifest

    def remove(self, name: str) -> None:
        """Removes a model, also one whose manifest is damaged. Its files stay until `prune`.

        Raises:
            CheckpointError: there is no such model.
        """
        if name not in self:
            raise self._unknown(name)
        with locked(self.root):
            self._manifest(name).unlink(missing_ok=True)
            sync_folder(self._manifests)

    def prune(self) -> Pruned:
        """Deletes what no model needs: files, links to them, and downloads and staged files that no process uses.

        Raises:
            CheckpointError: a manifest is damaged, so that it is unknown which files it needs.
        """
        if not self.root.is_dir():
            return Pruned(0, 0, 0)
        with locked(self.root):
            manifests = [self.read(name) for name in self.names()]
            needed = {file.sha256 for manifest in manifests for file in manifest.files}
            in_use = self._drop_snapshots({self.snapshot(manifest) for manifest in manifests})
            needed |= {link.readlink().name for folder in in_use for link in folder.iterdir() if link.is_symlink()}
            left = [blob for blob in _children(self._blobs) if blob.name not in needed]
            left += list(self._manifests.glob(".*.tmp"))
            sizes = [_delete_file(file) for file in left]
            for folder in (*_children(self.downloads), *_children(self._staging)):
                sizes += _delete_if_free(folder)
        return Pruned(len(sizes), sum(sizes), len(in_use))

    # Checking

    def problems(self, manifest: Manifest, hashing: bool = True) -> list[str]:
        """Returns a text for each problem of a model's files; without `hashing`, their contents are not read."""
        folder = self.snapshot(manifest)
        found = [problem for file in manifest.files for problem in self._file_problems(folder, file, hashing)]
        known = {file.name for file in manifest.files}
        found += [
            f"{shown(extra.name)} is not one of its files" for extra in _children(folder) if extra.name not in known
        ]
        return found

    def _file_problems(self, folder: Path, file: FileRecord, hashing: bool) -> Iterator[str]:
        link, blob = folder / file.name, self.blob(file.sha256)
        if not link.is_symlink() or link.readlink() != _target(file):
            yield f"{file.name} is not linked to its content"
        if not blob.is_file():
            yield f"the content of {file.name} is missing ({blob})"
        elif (size := blob.stat().st_size) != file.size:
            yield f"{file.name} has {size:,} bytes instead of {file.size:,} ({blob})"
        elif hashing and (sha256 := hash_of(blob)) != file.sha256:
            yield f"{file.name} is damaged: its SHA-256 is {sha256} instead of {file.sha256} ({blob})"

    # The pieces

    def _manifest(self, name: str) -> Path:
        return self._manifests / f"{name}.json"

    def _read_if_there(self, name: str) -> Manifest | None:
        try:
            return read_manifest(self._manifest(name), name) if is_id(name) else None
        except FileNotFoundError:
            return None

    def _move_blobs(self, staged: Mapping[str, Staged], undo: contextlib.ExitStack) -> None:
        """Moves the files to the names of their checksums. An existing file is replaced, as it may be damaged."""
        self._blobs.mkdir(exist_ok=True)
        for file in staged.values():
            blob = self.blob(file.sha256)
            file.path.chmod(file.path.stat().st_mode & READ_ONLY)
            if not blob.exists():
                undo.callback(blob.unlink, missing_ok=True)
            os.replace(file.path, blob)
        sync_folder(self._blobs)

    def _link(self, manifest: Manifest, undo: contextlib.ExitStack) -> None:
        folder = self.snapshot(manifest)
        if not folder.exists():
            folder.mkdir(parents=True)
            undo.callback(shutil.rmtree, folder, ignore_errors=True)
        link = self._snapshots / ".new"
        for file in manifest.files:  # replaced, not made: there may be a wrong one
            link.unlink(missing_ok=True)
            link.symlink_to(_target(file))
            os.replace(link, folder / file.name)
        for extra in {*os.listdir(folder)} - {file.name for file in manifest.files}:
            (folder / extra).unlink()
        sync_folder(folder)
        sync_folder(self._snapshots)

    def _drop_snapshots(self, needed: set[Path]) -> Sequence[Path]:
        """Deletes snapshots that are not needed, and returns those of them that servers still use."""
        in_use = []
        for folder in _children(self._snapshots):
            if folder in needed or not folder.is_dir():
                continue
            with locked_if_free(folder) as free:
                if free:
                    shutil.rmtree(folder)
                else:
                    in_use.append(folder)
        return in_use


def already_there(manifest: Manifest) -> CheckpointError:
    """Returns the error for a name that another model has."""
    text = f"there is a model {manifest.id} already, from {manifest.source}"
    return CheckpointError(f"--id: {text}; choose another name, or replace it by --force")


def _target(file: FileRecord) -> Path:
    """Returns the target of a snapshot's link, relative to it, so that the registry may be moved as a whole."""
    return Path("..", "..", "blobs", file.sha256)


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except FileNotFoundError:
        return []


def _delete_file(file: Path) -> int:
    size = file.lstat().st_size
    file.unlink()
    return size


def _delete_if_free(folder: Path) -> list[int]:
    """Deletes a folder that no process has locked, and returns the sizes of its files."""
    with locked_if_free(folder) as free:
        if not free:
            return []
        sizes = [file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()]
        with contextlib.suppress(FileNotFoundError):  # its process deleted it before it gave the lock back
            shutil.rmtree(folder)
        return sizes
