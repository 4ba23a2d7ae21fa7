"""Reads a text with a model, and writes for each neuron where it fires most: `bdh-batch model neurons`."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from bdh_batch.errors import BDHError, ConfigError
from bdh_batch.neurons.contexts import Contexts
from bdh_batch.neurons.reading import Reader
from bdh_batch.neurons.report import Context, Found, TokenText, json_lines, page
from bdh_batch.neurons.words import Words, occurrences
from bdh_batch.processes.model_settings import chosen_model
from bdh_batch.settings import Settings
from bdh_batch.text.folder import load_tokenizer
from bdh_batch.text.tokenizer import TokenIdsOnly, Tokenizer

CACHED_CONTEXTS = 2**14
RARE = 1e-9  # added to shares, of which the logarithm is taken


@dataclass
class Study:
    """What is asked for, by the command's flags."""

    settings: Settings
    text: Path
    out: Path
    words: Sequence[str]
    contexts: int
    around: int
    length: int
    page: int

    def run(self) -> str:
        """Does all of it, and says in a few words what was written.

        Raises:
            ConfigError, CheckpointError: it cannot be done.
        """
        text = _read(self.text)
        folder = _made(self.out)
        with closing(chosen_model(self.settings)) as located:
            reader = Reader.of(self.settings, located.path, self.length)
            beside = located.path if located.path.is_dir() else located.path.parent
            tokenizer = load_tokenizer(beside, reader.model.config.vocab_size)
        tokens = _tokens(tokenizer, text)
        shown = TokenText((_bytes_of(tokenizer, token) for token in tokens), self.around)
        layers, heads, per_head = reader.shape
        sizes, device = (layers, heads * per_head), reader.pool.states.device
        contexts = Contexts(*sizes, self.contexts, device)
        words = Words(self.words, self._places(text, shown), *sizes, device)
        with tqdm(total=len(tokens), unit=" tokens", desc="reading") as bar:
            for first, fired in reader.read(tokens):
                contexts.add(first, fired)
                words.add(first, fired)
                bar.update(fired.shape[1])
        facts = {
            **{"model": located.name, "text": self.text.name, "tokens": len(tokens), "length": self.length},
            **{"layers": layers, "heads": heads, "neurons_per_head": per_head},
            "words": _words_found(words, per_head),
        }
        findings = Findings(contexts, shown, per_head)
        whole = tqdm(findings, total=findings.fired, unit=" neurons", desc="writing")
        _write(folder / "neurons.json", json_lines(facts, whole))
        _write(folder / "neurons.html", [page(facts, findings.clearest(self.page)).encode()])
        return (
            f"{findings.fired:,} of {layers * heads * per_head:,} neurons fired; {folder / 'neurons.html'} shows some"
        )

    def _places(self, text: str, shown: TokenText) -> list[list[int]]:
        """For each word, the positions of its last tokens."""
        if not self.words:
            return []
        if shown.bytes != text.encode():
            raise ConfigError(
                "--words: this model's tokenizer changes texts, so words cannot be found among its tokens"
            )
        return [[shown.at(byte) for byte in some] for some in occurrences(self.words, text)]


class Findings:
    """The neurons that fired, in their order, or those that fire most clearly.

    Args:
        per_head: neurons of a head.
    """

    def __init__(self, contexts: Contexts, text: TokenText, per_head: int) -> None:
        self._values = contexts.values.cpu().numpy()
        self._positions = contexts.positions.cpu().numpy()
        self._shares = contexts.counts.cpu().numpy() / contexts.tokens
        self._per_head = per_head
        self._context = lru_cache(CACHED_CONTEXTS)(text.context)
        self.fired = int(np.count_nonzero(self._shares))

    def __iter__(self) -> Iterator[Found]:
        for layer, shares in enumerate(self._shares):
            for index in np.flatnonzero(shares).tolist():
                yield self._found(layer, index)

    def clearest(self, most: int) -> list[Found]:
        """As many as are asked for: those with the largest mean of what is kept, times the bits that it tells to fire,
        which are more the rarer it is."""
        scores = self._values.mean(axis=2) * -np.log2(self._shares + RARE) * (self._shares > 0)
        best = np.argsort(-scores, axis=None, kind="stable")[: min(most, self.fired)]
        return [self._found(*divmod(at, scores.shape[1])) for at in best.tolist()]

    def _found(self, layer: int, index: int) -> Found:
        values, positions = self._values[layer, index].tolist(), self._positions[layer, index].tolist()
        kept: list[Context] = [
            self._context(position, 0.0)._replace(value=round(value, 6))
            for value, position in zip(values, positions)
            if value > 0
        ]
        return Found(layer, *divmod(index, self._per_head), round(float(self._shares[layer, index]), 6), kept)


def _words_found(words: Words, per_head: int) -> list[dict[str, Any]]:
    return [
        {
            "word": word,
            "occurrences": count,
            "neurons": [
                {
                    **{"layer": each.layer, "head": each.neuron // per_head, "neuron": each.neuron % per_head},
                    **{"mean": round(each.mean, 6), "others": round(each.others, 6)},
                }
                for each in telling
            ],
        }
        for word, count, telling in zip(words.words, words.counts, words.telling(), strict=True)
    ]


def _read(file: Path) -> str:
    try:
        text = file.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"--text: {file} cannot be read ({error.strerror or error})") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"--text: {file} is not UTF-8 (at byte {error.start})") from error
    except ValueError as error:  # a NUL character in its name
        raise ConfigError(f"--text: {str(file)!r} cannot be a path ({error})") from error
    if not text:
        raise ConfigError(f"--text: {file} is empty")
    return text


def _made(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--out: {folder} cannot be made ({error})") from error
    return folder


def _tokens(tokenizer: Tokenizer, text: str) -> Sequence[int]:
    if isinstance(tokenizer, TokenIdsOnly):
        raise ConfigError("--text: this model has no tokenizer")
    try:
        return tokenizer.encode(text, add_special=False)
    except BDHError as error:
        raise ConfigError(f"--text: {error}") from error


def _bytes_of(tokenizer: Tokenizer, token: int) -> bytes:
    raw = tokenizer.token_bytes(token)
    return tokenizer.name(token).encode() if raw is None else raw


def _write(file: Path, pieces: Iterable[bytes]) -> None:
    """Writes a file, whole or not at all."""
    part = file.with_name(f".{file.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as output:
            output.writelines(pieces)
        part.replace(file)
    except OSError as error:
        raise ConfigError(f"--out: {file} cannot be written ({error.strerror or error})") from error
    finally:
        part.unlink(missing_ok=True)
