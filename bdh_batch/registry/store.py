"""The folder of the registry: what lies where, how it changes whole or not at all, and whether it is still right.

    manifests/NAME.json       what is known of a model
    blobs/SHA256              the files, by their content: models may share them
    snapshots/DIGEST/FILE     what is loaded: links to the blobs, by the names that the loader looks for
    downloads/, staging/      what is not yet part of a model

Whoever changes manifests, blobs or snapshots holds the folder itself; a snapshot is held, shared, by servers of it.
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
from bdh_batch.registry.files import Staged, hash_of, sync_folder, write_whole
from bdh_batch.registry.locks import locked, locked_if_free
from bdh_batch.registry.manifest import FileRecord, Manifest, is_id, read_manifest
from bdh_batch.system.documents import brief, listed, shown

READ_ONLY = 0o444


@dataclass(frozen=True, slots=True)
class Pruned:
    """What `Store.prune` did: how many bytes of how many files are gone, and how many models stay as servers use
    them."""

    files: int
    size: int
    in_use: int


class Store:
    """The registry in a folder, which is made when something is first added."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.downloads = root / "downloads"
        self._manifests = root / "manifests"
        self._blobs = root / "blobs"
        self._snapshots = root / "snapshots"
        self._staging = root / "staging"

    # What there is

    def names(self) -> list[str]:
        files = self._manifests.glob("*.json")
        return sorted(name for file in files if is_id(name := file.name.removesuffix(".json")))

    def __contains__(self, name: str) -> bool:
        return is_id(name) and self._manifest(name).is_file()

    def read(self, name: str) -> Manifest:
        """
        Raises:
            CheckpointError: there is no such model (the message lists those that there are), or its manifest is
                damaged.
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
        """The folder of the model's files."""
        return self._snapshots / manifest.digest

    def blob(self, sha256: str) -> Path:
        return self._blobs / sha256

    def in_use(self, manifest: Manifest) -> bool:
        """Whether a server has the model."""
        folder = self.snapshot(manifest)
        with locked_if_free(folder) as free:
            return folder.is_dir() and not free

    # Changing it

    @contextlib.contextmanager
    def staging(self) -> Iterator[Path]:
        """A folder for files that are to be published; it is deleted in the end."""
        folder = self._staging / secrets.token_hex(8)
        with locked(folder):
            try:
                yield folder
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def publish(self, manifest: Manifest, staged: Mapping[str, Staged], replace: bool) -> Manifest:
        """Makes a model of staged files, whole or not at all; the manifest that is there then.

        Raises:
            CheckpointError: another model of this name is there.
            OSError: nothing of it is left behind.
        """
        with locked(self.root):
            there = self._read_if_there(manifest.id) if not replace else None
            if there is not None:
                if there.same_model(manifest):
                    return there
                raise already_there(there)
            with contextlib.ExitStack() as undo:
                self._place(staged, undo)
                self._link(manifest, undo)
                self._manifests.mkdir(exist_ok=True)
                write_whole(self._manifest(manifest.id), (manifest.model_dump_json(indent=2) + "\n").encode())
                undo.pop_all()
        return manifest

    def remove(self, name: str) -> None:
        """Forgets a model, also one whose manifest is damaged. Its files stay until `prune`.

        Raises:
            CheckpointError: there is no such model.
        """
        if name not in self:
            raise self._unknown(name)
        with locked(self.root):
            self._manifest(name).unlink(missing_ok=True)
            sync_folder(self._manifests)

    def prune(self) -> Pruned:
        """Deletes what no model needs: files, links to them, downloads and additions that nobody goes on with.

        Raises:
            CheckpointError: a manifest is damaged, so that nobody knows what it needs.
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

    # Whether it is right

    def problems(self, manifest: Manifest, hashing: bool = True) -> list[str]:
        """What is wrong with a model's files, a text for each; without `hashing`, only what costs no reading."""
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

    def _place(self, staged: Mapping[str, Staged], undo: contextlib.ExitStack) -> None:
        """Moves the files to their content's names. One that is there is replaced: it may have been damaged."""
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
        """Deletes those that are not needed; returned are those of them that servers still use."""
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
    text = f"there is a model {manifest.id} already, from {manifest.source}"
    return CheckpointError(f"--id: {text}; choose another name, or replace it by --force")


def _target(file: FileRecord) -> Path:
    """Where a link of a snapshot leads, from there: the registry may be moved as a whole."""
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
    """The sizes of the files that were deleted."""
    with locked_if_free(folder) as free:
        if not free:
            return []
        sizes = [file.lstat().st_size for file in folder.rglob("*") if not file.is_dir()]
        shutil.rmtree(folder)
        return sizes
