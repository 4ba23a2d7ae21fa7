"""Many chats share a system prompt: what is computed of their prompts, and how long their first tokens take."""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from bdh_batch.bench.strain import Watch
from bdh_batch.scheduler.prefixes import common, pack
from benchmarks.client import CHAT, Response
from benchmarks.common import ratio
from benchmarks.served import Served, served
from benchmarks.server.serving.common import (
    GREEDY,
    Figures,
    print_scenario,
    refuse_unless,
    strained,
    text,
    use_all_slots,
)


async def shared_prefix(chosen: argparse.Namespace) -> Figures:
    draw = random.Random(4)
    few = ["scheduler.max_running=32", "prefix_cache.entries=32", *chosen.set]
    off = ["prefix_cache.enabled=false"]
    kinds = {"kept": [], "not_kept": off, "not_shared": [*off, f"prefix_cache.min_tokens={2**30}"]}
    with ExitStack() as stack:
        servers = {name: stack.enter_context(served(*few, *options)) for name, options in kinds.items()}
        for server in servers.values():
            await use_all_slots(server, 2 * (32 + 32))
        async with Watch() as watch:
            figures = {
                "one_after_another": await asked(servers, chats(draw, chosen), 1),
                f"{chosen.together}_at_a_time": await asked(servers, chats(draw, chosen), chosen.together),
            }
    for name, found in figures.items():
        print_scenario(name, found)
    return {"requests": chosen.chats, "system_tokens": chosen.system, **figures, "client": strained(watch)}


def chats(draw: random.Random, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Bodies of chat requests with a system prompt in common and a question each."""
    system = {"role": "system", "content": text(draw, chosen.system)}
    questions = [{"role": "user", "content": text(draw, draw.randrange(20, 60))} for _ in range(chosen.chats)]
    return [{"messages": [system, question], "max_tokens": 8, **GREEDY} for question in questions]


async def asked(servers: Mapping[str, Served], bodies: Sequence[dict[str, Any]], together: int) -> Figures:
    """All of `bodies` of every server, so many together; the servers take turns."""
    computed = {name: -server.metric("bdh_prompt_tokens_total") for name, server in servers.items()}
    responses: dict[str, list[Response]] = {name: [] for name in servers}
    for start in range(0, len(bodies), together):
        for name, server in servers.items():
            some = bodies[start : start + together]
            responses[name] += await asyncio.gather(*[server.ask(CHAT, **body) for body in some])
    for found in zip(*responses.values(), strict=True):
        refuse_unless(
            all(one.tokens == found[0].tokens for one in found), "A cached completion differs from an uncached"
        )
    for name, server in servers.items():
        computed[name] += server.metric("bdh_prompt_tokens_total")
    return prefix_figures(responses, computed)


def prefix_figures(responses: Mapping[str, Sequence[Response]], computed: Mapping[str, float]) -> Figures:
    """`shared_tokens` is what all prompts begin with; `least_tokens` what has to be computed if that is once.

    A little less than the least are computed where some of the prompts have more than that in common.
    """
    prompts = [response.prompt for response in responses["kept"]]
    asked_for = sum(map(len, prompts))
    shared = min(common(pack(prompts[0]), pack(other)) for other in prompts[1:])
    least = asked_for - shared * (len(prompts) - 1)
    first = {name: [response.first for response in found] for name, found in responses.items()}
    return {
        "prompt_tokens": asked_for,
        "shared_tokens": shared,
        "least_tokens": least,
        "computed_tokens": dict(computed),
        "computed_to_least": computed["kept"] / least,
        "first_token_seconds": {name: statistics.median(seconds) for name, seconds in first.items()},
        **{f"ratio_to_{name}": asdict(ratio(first["kept"], first[name])) for name in responses if name != "kept"},
    }
