"""Command lines of `bench serve` as the options they mean, and files of prompts."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from bdh_batch.bench.options import Options, Parser, add_arguments, options_of


def options(*flags: object) -> Options:
    parser = Parser()
    add_arguments(parser)
    found: argparse.Namespace = parser.parse_args([str(flag) for flag in flags])
    return options_of(found)


def prompts(file: Path, entries: Sequence[object]) -> Path:
    """A custom dataset: a text or token ids are a prompt, anything else is a line as it is."""
    lines = [entry if isinstance(entry, dict) else {"prompt": entry} for entry in entries]
    file.write_text("\n".join(map(json.dumps, lines)) + "\n")
    return file
