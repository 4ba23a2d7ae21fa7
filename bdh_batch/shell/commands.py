"""The flags of `bdh-batch run` and `bdh-batch run-batch`. Only a command that computes pays for importing torch."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bdh_batch.settings import Settings

Compute = Callable[[Settings, argparse.Namespace], int]
INTERRUPTED = 130


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Adds them.

    Args:
        common: the flags of options.
        run: runs one, by `compute` of what is parsed.
    """
    talk = commands.add_parser("run", parents=[common], help="talk to a model, without a server")
    talk.add_argument("prompt", nargs="?", help="what it is to respond to, once; else lines of the input are, each")
    talk.set_defaults(run=run, compute=partial(_unless_interrupted, _talk))
    batch = commands.add_parser("run-batch", parents=[common], help="respond to a file of requests, without a server")
    for flag, text in (
        ("input-file", "requests, as lines of OpenAI's Batch API"),
        ("output-file", "where their responses go; those that are there are kept"),
    ):
        batch.add_argument(f"-{flag[0]}", f"--{flag}", type=Path, required=True, metavar="FILE", help=text)
    batch.set_defaults(run=run, compute=partial(_unless_interrupted, _batch))


def _unless_interrupted(compute: Compute, settings: Settings, options: argparse.Namespace) -> int:
    """Its exit code, or, where Ctrl-C ends it, the shell's own for that."""
    try:
        return compute(settings, options)
    except KeyboardInterrupt:
        return INTERRUPTED


def _talk(settings: Settings, options: argparse.Namespace) -> int:
    from bdh_batch.shell.talk import talk

    return talk(settings, options.prompt)


def _batch(settings: Settings, options: argparse.Namespace) -> int:
    from bdh_batch.shell.run_batch import run_batch

    return run_batch(settings, options.input_file, options.output_file)
