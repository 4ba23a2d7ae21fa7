"""Many streams at a time with the official asynchronous client, and how fast they went."""

from __future__ import annotations

import argparse
import asyncio
import os
import time
from dataclasses import dataclass

from openai import AsyncOpenAI


@dataclass(frozen=True)
class StreamResult:
    """One stream: its text, its tokens, and the seconds to its first piece of text."""

    text: str
    tokens: int
    first: float


async def ask(client: AsyncOpenAI, model: str, seed: int, max_tokens: int) -> StreamResult:
    began, first, tokens, text = time.perf_counter(), 0.0, 0, ""
    stream = await client.completions.create(
        model=model,
        prompt="ROMEO:\n",
        max_tokens=max_tokens,
        seed=seed,
        stream=True,
        stream_options={"include_usage": True},
    )
    async with stream:
        async for chunk in stream:
            for choice in chunk.choices:
                first = first or time.perf_counter() - began
                text += choice.text
            if chunk.usage:
                tokens = chunk.usage.completion_tokens
    return StreamResult(text, tokens, first)


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--streams", type=int, default=64, help="at a time (default 64)")
    parser.add_argument("--max-tokens", type=int, default=100, help="of each stream (default 100)")
    options = parser.parse_args()
    async with AsyncOpenAI(
        base_url=os.environ.get("OPENAI_BASE_URL", "http://127.0.0.1:8000/v1"),
        api_key=os.environ.get("OPENAI_API_KEY", "none"),
    ) as client:
        model = (await client.models.list()).data[0].id
        began = time.perf_counter()
        results = await asyncio.gather(
            *(ask(client, model, seed, options.max_tokens) for seed in range(options.streams))
        )
        seconds = time.perf_counter() - began
    tokens = sum(result.tokens for result in results)
    firsts = sorted(result.first for result in results)
    print(f"{results[0].text}\n")
    print(f"{len(results)} streams of {model}, {tokens} tokens in {seconds:.2f} s: {tokens / seconds:.0f} tokens/s")
    print(f"first text after {firsts[len(firsts) // 2]:.2f} s (median), {firsts[-1]:.2f} s (slowest)")


if __name__ == "__main__":
    asyncio.run(main())
