"""The flags of `bdh-batch ray`. Only a command that deploys pays for importing Ray."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from bdh_batch.errors import ConfigError
from bdh_batch.settings import Settings


def add_commands(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    common: argparse.ArgumentParser,
    run: Callable[[argparse.Namespace], int],
) -> None:
    """Adds them.

    Args:
        common: the flags of options.
        run: runs what is parsed.
    """
    ray = commands.add_parser("ray", help="run the server on a cluster of Ray")
    actions = ray.add_subparsers(required=True, metavar="ACTION")
    up = actions.add_parser("up", parents=[common], help="start the server on Ray Serve, until SIGTERM")
    up.set_defaults(run=run)


def up(settings: Settings, announce: Callable[[str, str], None]) -> None:
    """Serves on a cluster until SIGTERM or SIGINT. Raises ConfigError: it cannot start, or Ray is not installed."""
    try:
        import ray.serve  # noqa: F401  # an extra: needed only here
    except ImportError as error:
        raise ConfigError(f"Ray is not installed ({error}); pip install 'bdh-batch[ray]'") from error
    from bdh_batch.deploy.up import up as run

    run(settings, announce)
