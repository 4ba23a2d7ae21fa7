"""The flags of `bdh-batch model neurons`. Only the command that computes pays for importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Settings

MOST_CONTEXTS, MOST_WORDS, MOST_AROUND, MOST_LENGTH, MOST_PAGE = 32, 32, 400, 2**20, 10_000
BOUNDS = {  # flags that are numbers: the default, the least, the most, and what they are
    "contexts": (5, 1, MOST_CONTEXTS, "of each neuron that are kept, the strongest"),
    "around": (48, 1, MOST_AROUND, "bytes of a context before its token, and half as many after it"),
    "length": (512, 2, MOST_LENGTH, "tokens that are read with one state; then the model begins anew"),
    "page": (400, 1, MOST_PAGE, "neurons that the HTML page shows"),
}


def add_command(
    actions: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Adds it.

    Args:
        common: the flags of options.
        run: runs `compute` of what is parsed.
    """
    parser = actions.add_parser("neurons", parents=[common], help="where in a text each neuron fires most")
    parser.add_argument("--text", type=Path, required=True, metavar="FILE", help="what the model reads, in UTF-8")
    parser.add_argument(
        "--out", type=Path, default=Path("neurons"), metavar="DIR", help="for neurons.json and neurons.html (neurons)"
    )
    parser.add_argument("--words", metavar="A,B", help="find the neurons that tell these words of the text apart")
    for name, (default, least, most, text) in BOUNDS.items():
        parser.add_argument(
            f"--{name}", metavar="N", default=f"{default}", help=f"{text} ({least} to {most}: {default})"
        )
    parser.set_defaults(run=run, compute=_study)


def _study(settings: Settings, options: argparse.Namespace) -> int:
    numbers = {name: _number(name, getattr(options, name)) for name in BOUNDS}
    words = _words(options.words)
    from bdh_batch.neurons.study import Study

    print(Study(settings, options.text, options.out, words, **numbers).run())
    return 0


def _number(name: str, text: str) -> int:
    _, least, most, _ = BOUNDS[name]
    if not (text.isascii() and text.isdecimal() and len(text) <= 9 and least <= int(text) <= most):
        raise ConfigError(f"--{name}: should be {least} to {most}, not {text!r}")
    return int(text)


def _words(text: str | None) -> list[str]:
    words = [] if text is None else [word.strip() for word in text.split(",")]
    if not all(words):
        raise ConfigError(f"--words: should be words with commas between them, not {text!r}")
    if len(set(words)) < len(words):
        raise ConfigError("--words: a word comes twice")
    if len(words) > MOST_WORDS:
        raise ConfigError(f"--words: at most {MOST_WORDS} words, not {len(words)}")
    return words
