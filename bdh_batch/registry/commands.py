"""The commands `bdh-batch model add`, `list`, `show`, `verify`, `remove` and `prune`: their flags and output."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.registry.files import explained
from bdh_batch.registry.manifest import Manifest
from bdh_batch.registry.store import Store
from bdh_batch.system.cache_folder import cache_folder
from bdh_batch.system.documents import brief, listed, shown
from bdh_batch.system.sizes import parse_bytes, size_text

LARGEST = "64 GiB"
INTERRUPTED = 130  # the exit code, as shells have it
LABEL = 12  # characters


def add_commands(actions: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the registry's commands to the parser of `bdh-batch model`."""
    add = actions.add_parser("add", help="fetch or copy a model, and keep it by a name")
    add.add_argument("source", metavar="SOURCE", help="a folder, a file, a URL, or hf:ORG/NAME[@REVISION]")
    add.add_argument("--id", required=True, metavar="NAME", help="the name: bdh-batch serve --model NAME")
    add.add_argument(
        "--sha256", action="append", default=[], metavar="HEX", help="of the weights; NAME=HEX is of the file NAME"
    )
    add.add_argument("--max-size", default=LARGEST, metavar="SIZE", help=f"of all files together (default {LARGEST})")
    add.add_argument("--allow-pickle", action="store_true", help="take torch files from a URL or the Hub, too")
    add.add_argument("--force", action="store_true", help="replace the model that has the name")
    add.set_defaults(run=_add)
    listing = actions.add_parser("list", help="the models that were added")
    listing.add_argument("--json", action="store_true", help="their manifests, as JSON")
    listing.set_defaults(run=_list)
    show = actions.add_parser("show", help="where a model comes from, and what it consists of")
    show.add_argument("name", metavar="NAME")
    show.add_argument("--json", action="store_true", help="its manifest, as JSON")
    show.set_defaults(run=_show)
    verify = actions.add_parser("verify", help="read every file of models, and compare it with what was added")
    verify.add_argument("names", nargs="*", metavar="NAME", help="else all")
    verify.set_defaults(run=_verify)
    remove = actions.add_parser("remove", help="forget models; `prune` then frees their files")
    remove.add_argument("names", nargs="+", metavar="NAME")
    remove.set_defaults(run=_remove)
    prune = actions.add_parser("prune", help="delete what no model needs, and downloads that were broken off")
    prune.set_defaults(run=_prune)


def _store() -> Store:
    return Store(cache_folder())


def _add(options: argparse.Namespace) -> int:
    from bdh_batch.registry.add import AddOptions, add, checksum  # imports torch

    checksums: dict[str, str] = {}
    for name, digest in map(checksum, options.sha256):
        if checksums.setdefault(name, digest) != digest:
            raise ConfigError(f"--sha256: two different ones for {shown(name) or 'the weights'}")
    terms = AddOptions(_size(options.max_size), checksums, options.allow_pickle, options.force)
    try:
        manifest = add(_store(), options.source, options.id, terms)
    except KeyboardInterrupt:
        print("bdh-batch: interrupted; the same command goes on with what can be resumed", file=sys.stderr)
        return INTERRUPTED
    print(f"{_summary(manifest)} is added; serve it: bdh-batch serve --model {manifest.id}")
    return 0


def _size(text: str) -> int:
    size = parse_bytes(text)
    if not isinstance(size, int) or size < 1:
        raise ConfigError(f"--max-size: should be a number of bytes, as in '8 GiB', not {brief(text)}")
    return size


def _list(options: argparse.Namespace) -> int:
    store, damaged = _store(), []
    found: list[Manifest] = []
    with explained(store.root):
        for name in store.names():
            try:
                found.append(store.read(name))
            except CheckpointError as error:
                damaged.append(str(error))
    if options.json:
        print(json.dumps([manifest.model_dump(mode="json") for manifest in found], indent=2))
    else:
        rows = [
            (each.id, size_text(each.size), each.format, f"{each.created:%Y-%m-%d}", shown(each.source))
            for each in found
        ]
        for line in _table([("NAME", "SIZE", "FORMAT", "ADDED", "SOURCE"), *rows] if rows else []):
            print(line)
    if damaged:
        raise CheckpointError(listed(damaged))
    return 0


def _table(rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        yield "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()


def _show(options: argparse.Namespace) -> int:
    store = _store()
    with explained(store.root):
        manifest = store.read(options.name)
    if options.json:
        print(manifest.model_dump_json(indent=2))
        return 0
    facts = {
        "name": manifest.id,
        "source": shown(manifest.source),
        **({"revision": shown(manifest.revision)} if manifest.revision else {}),
        "format": manifest.format,
        **({"kind": f"{manifest.kind}: {manifest.variant}"} if manifest.kind else {}),
        "added": f"{manifest.created:%Y-%m-%d %H:%M:%S %Z}",
        "config": ", ".join(f"{shown(name)} {shown(value)}" for name, value in manifest.config.items()),
        "folder": str(store.snapshot(manifest)),
        "size": size_text(manifest.size),
    }
    for label, text in facts.items():
        print(f"{label:<{LABEL}}{text}")
    print()
    for line in _table([(file.name, f"{file.size:,}", file.sha256) for file in manifest.files]):
        print(line)
    return 0


def _verify(options: argparse.Namespace) -> int:
    store, problems = _store(), []
    with explained(store.root):
        for name in options.names or store.names():
            manifest = store.read(name)
            if found := store.problems(manifest):
                problems.append(f"{name}: {listed(found)}")
            else:
                print(f"{_summary(manifest)} is as it was added")
    if problems:
        raise CheckpointError(f"{listed(problems)}. Add it again, with --force")
    return 0


def _remove(options: argparse.Namespace) -> int:
    store = _store()
    with explained(store.root):
        for name in options.names:
            served = _is_served(store, name)
            store.remove(name)
            rest = "a server uses it, and keeps its files until it ends" if served else "`model prune` frees its files"
            print(f"{name} is removed; {rest}")
    return 0


def _is_served(store: Store, name: str) -> bool:
    try:
        return store.in_use(store.read(name))
    except CheckpointError:  # damaged, which is no reason to keep it; or not there, which `remove` reports
        return False


def _prune(options: argparse.Namespace) -> int:
    store = _store()
    with explained(store.root):
        pruned = store.prune()
    print(f"deleted {_files(pruned.files)}, {size_text(pruned.size)}")
    if pruned.in_use:
        print(
            f"removed models that servers still use: {pruned.in_use}; prune again when they have ended", file=sys.stderr
        )
    return 0


def _summary(manifest: Manifest) -> str:
    return f"{manifest.id} ({_files(len(manifest.files))}, {size_text(manifest.size)})"


def _files(count: int) -> str:
    return f"{count:,} {'file' if count == 1 else 'files'}"
