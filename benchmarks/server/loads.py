"""Loads that several systems get in turn: as a file's lines for `bench serve`, and as jobs for an engine in process."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import ROOT
from benchmarks.engine.static import Job

WORDS = (ROOT / "tests" / "data" / "shakespeare-validation.txt").read_text().split()
PROMPT = 64  # tokens


@dataclass(frozen=True)
class Request:
    prompt: str  # ASCII: as many tokens of bytes as characters
    length: int  # tokens of its completion


def load(lengths: Sequence[int], seed: int) -> list[Request]:
    """Prompts that no other seed's are like, and completions of these lengths."""
    draw = random.Random(seed)
    return [Request(prompt(draw), length) for length in lengths]


def prompt(draw: random.Random) -> str:
    words = " ".join(draw.choices(WORDS, k=PROMPT))
    return f"{draw.getrandbits(48):012x} {words}".encode("ascii", "ignore").decode()[:PROMPT]


def tokens(load: Sequence[Request]) -> int:
    return sum(request.length for request in load)


def write(file: Path, load: Sequence[Request]) -> None:
    lines = (json.dumps({"prompt": request.prompt, "output_tokens": request.length}) for request in load)
    file.write_text("\n".join(lines) + "\n")


def jobs(load: Sequence[Request]) -> list[Job]:
    return [Job(list(request.prompt.encode()), request.length, seed) for seed, request in enumerate(load)]
