"""A gateway before one fake upstream of each kind."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
from openai import AsyncOpenAI

from tests.conftest import ServeFactory, Server
from tests.upstreams.fakes import web, worker
from tests.upstreams.gateway import BHARATGEN, Behind, gateway


@pytest.fixture(scope="module")
async def behind(serve: ServeFactory) -> AsyncIterator[tuple[Server, Behind]]:
    do = Behind()
    async with (
        web(lambda connection: do.web(connection)) as fake,
        worker(lambda request, context: do.stream(request, context), lambda request: do.whole(request)) as kserve,
        gateway(
            serve,
            {
                **{"id": "llamacpp", "kind": "kserve", "endpoints": [kserve.address], "version": "llamacpp"},
                **{"model": "generate", "stream_model": "generate_stream", "drop": ["stop"]},
                "aliases": ["tinyllama"],
            },
            {
                **{"id": "gpt", "kind": "openai", "url": f"{fake.url}/v1", "aliases": ["gpt-4"], "failures": 1000},
                **{"pass_fields": ["thinking", "user"], "drop": ["verbosity"]},
            },
            {"id": "bharatgen-param-17b", "kind": "gradio", "url": fake.url, "reasoning": True, **BHARATGEN},
            grpc_port=do.grpc_port,
        ) as server,
    ):
        yield server, do


@pytest.fixture(scope="module")
async def client(behind: tuple[Server, Behind]) -> AsyncIterator[AsyncOpenAI]:
    async with behind[0].async_openai() as client:
        yield client
