"""`bdh-batch ray up` with front ends that choose engines at random: what routing by prefixes is compared with.

python -m benchmarks.server.random_cluster --port 8000 --set engine.replicas=3
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from functools import partial
from typing import Any

from bdh_batch import settings
from bdh_batch.backends import remote
from bdh_batch.backends.routing import AnyTarget, Routing
from bdh_batch.deploy.ray import application
from bdh_batch.deploy.replicas import FrontReplica
from bdh_batch.deploy.up import up
from bdh_batch.launch import say_nothing
from bdh_batch.messages import GenerationRequest


class RandomRouting(Routing):
    """Chooses any engine. The same requests get the same engines in each run."""

    def __init__(self, draw: random.Random) -> None:
        super().__init__(draw)
        self._chance = random.Random(0)

    def choose(self, ready: Sequence[AnyTarget], request: GenerationRequest) -> AnyTarget | None:
        return self._chance.choice(ready) if ready else None


class RandomFrontReplica(FrontReplica):
    """A front end that routes at random."""

    async def __init__(self, *arguments: Any) -> None:  # type: ignore[misc]  # Ray awaits it
        remote.Routing = RandomRouting  # type: ignore[attr-defined]  # in this process, which Ray has started for it
        await super().__init__(*arguments)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="OPTION=VALUE")
    chosen = parser.parse_args(argv)
    options: list[tuple[str, object]] = [("server.port", chosen.port)]
    for text in chosen.set:
        option, _, value = text.partition("=")
        options.append((option, value))
    up(settings.load(None, options).settings, say_nothing, partial(application, front_end=RandomFrontReplica))


if __name__ == "__main__":
    main()
