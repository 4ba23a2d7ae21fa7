"""Measures what a gateway costs: the same streams from a server itself, and through a gateway before it.

    python -m benchmarks.server.gateway             # 64 streams of 200 tokens, five rounds
    python -m benchmarks.server.gateway --rounds 1

The server is a small one, so that its own work is little. The gateway asks it by KServe v2 over gRPC, and by OpenAI's
API, as a server like this one and as any other. Ways take turns; one process of clients reads them all. Figures are
medians of rounds: tokens a second, the microseconds of processor time that a token costs the gateway, its share of one
core, and tokens a second beside those of the direct way in the same round. Writes `gateway.json`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import ROOT
from benchmarks.client import Client
from benchmarks.common import figure
from benchmarks.report import report_head, results_folder, write_report
from benchmarks.served import Served, free_port, served

MODEL = ROOT / "tests" / "data" / "conformance" / "tiny"
NAME = "tiny"
DIRECT = "direct"
WARM_TOKENS = 8


async def streams(client: Client, model: str, count: int, tokens: int) -> float:
    """Returns the seconds that so many streams take together."""
    began = time.perf_counter()
    asked = [
        await client.send(model=model, prompt=f"stream {number}", seed=number, max_tokens=tokens)
        for number in range(count)
    ]
    await asyncio.gather(*(stream.end() for stream in asked))
    return time.perf_counter() - began


def measured(way: str, server: Served, gateway: Served, count: int, tokens: int) -> dict[str, float]:
    """One round of one way."""
    front = psutil.Process(gateway.pid)
    before = sum(front.cpu_times()[:2])
    client = server if way == DIRECT else gateway
    seconds = asyncio.run(streams(client, NAME if way == DIRECT else way, count, tokens))
    spent = sum(front.cpu_times()[:2]) - before
    return {"tokens/s": count * tokens / seconds, "us": spent / (count * tokens) * 1e6, "share": spent / seconds}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder of the result; else that of this machine")
    options = parser.parse_args(arguments)
    report: dict[str, Any] = report_head(["grpcio", "httpx", "psutil", "tritonclient"])
    port = free_port()
    with served(f"model.path={MODEL}", f"kserve.grpc_port={port}") as server:
        common = {"model": NAME, "first_token_seconds": 600, "drop": ["return_token_ids"]}  # which the client asks for
        upstreams = [
            {"id": "kserve", "kind": "kserve", "endpoints": [f"127.0.0.1:{port}"], **common},
            {"id": "openai", "kind": "openai", "url": f"{server.url}/v1", **common},
            {"id": "stranger", "kind": "openai", "url": f"{server.url}/v1", "ours": False, **common},
        ]
        ways = [DIRECT, *(str(each["id"]) for each in upstreams)]
        with served(f"upstreams={json.dumps(upstreams)}", module=("bdh_batch", "gateway")) as gateway:
            for way in ways:
                measured(way, server, gateway, options.streams, WARM_TOKENS)
            rounds = [
                {way: measured(way, server, gateway, options.streams, options.tokens) for way in ways}
                for _ in range(options.rounds)
            ]
    for way in ways:
        of_way = [each[way] for each in rounds]
        report[way] = {"tokens_per_second": figure([each["tokens/s"] for each in of_way], "tokens/s", "higher")}
        if way != DIRECT:
            beside = [each[way]["tokens/s"] / each[DIRECT]["tokens/s"] for each in rounds]
            report[way]["us_per_token"] = figure([each["us"] for each in of_way], "us", "lower")
            report[way]["share_of_a_core"] = figure([each["share"] for each in of_way], "cores", "lower")
            report[way]["beside_direct"] = figure(beside, "ratio", "higher")
        print(way, {name: round(each["value"], 3) for name, each in report[way].items()}, file=sys.stderr)
    report["streams"], report["tokens"] = options.streams, options.tokens
    write_report((options.out or results_folder()) / "gateway.json", report)


if __name__ == "__main__":
    main()
