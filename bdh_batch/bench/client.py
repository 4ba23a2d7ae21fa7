"""What is asked of the server: streams that are measured, and small questions that are not."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from bdh_batch.bench.connection import Address, Pool
from bdh_batch.bench.data import Prompt
from bdh_batch.bench.options import Options
from bdh_batch.bench.outcome import Failed, Outcome
from bdh_batch.bench.reading import Stream, Whole
from bdh_batch.errors import ConfigError

QUESTION_SECONDS = 60.0
Exchange = tuple[str, str]  # what the user said, and what the assistant said


class Client:
    """Speaks to one server over a pool of its own."""

    def __init__(self, options: Options, api_key: str | None) -> None:
        self._options = options
        self._address = Address.of(options.url, options.insecure)
        self._pool = Pool(self._address)
        if api_key and not all("\x20" < character < "\x7f" for character in api_key):
            raise ConfigError("OPENAI_API_KEY: has a space, a line's end or what is not ASCII")
        key = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self._headers = {"content-type": "application/json", **key, **options.headers}
        self.model = options.served_model_name or options.model or ""

    def close(self) -> None:
        self._pool.close()

    async def question(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON of the response. Raises Failed."""
        response = Whole()
        content = b"" if body is None else orjson.dumps(body)
        try:
            async with asyncio.timeout(QUESTION_SECONDS):
                await self._pool.exchange(self._address.request(method, path, self._headers, content), response)
        except TimeoutError:
            raise Failed("timeout", f"no response within {QUESTION_SECONDS:g} s") from None
        return response.json()

    async def ask(
        self, outcome: Outcome, prompt: Prompt, history: Sequence[Exchange], count: Callable[[int], None]
    ) -> None:
        """Sends a prompt after what was said before, and writes into `outcome` what comes."""
        outcome.begun = time.perf_counter()
        stream = Stream(outcome, count)
        try:
            async with asyncio.timeout(self._options.request_timeout_sec):
                await self._pool.exchange(self._request(outcome.index, prompt, history), stream)
            stream.finish()
            outcome.complete = True
        except TimeoutError:
            outcome.failure = Failed("timeout", f"not whole within {self._options.request_timeout_sec:g} s")
        except Failed as failed:
            outcome.failure = failed

    def _request(self, index: int, prompt: Prompt, history: Sequence[Exchange]) -> bytes:
        headers = {**self._headers, "x-request-id": f"{self._options.request_id_prefix}{index}"}
        content = orjson.dumps(self._body(prompt, history))
        return self._address.request("POST", self._options.path, headers, content)

    def _body(self, prompt: Prompt, history: Sequence[Exchange]) -> dict[str, Any]:
        options = self._options
        body: dict[str, Any] = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        if options.chats:
            said = [(role, text) for turn in history for role, text in zip(("user", "assistant"), turn)]
            body["messages"] = [{"role": role, "content": text} for role, text in [*said, ("user", prompt.content)]]
            body["max_completion_tokens"] = prompt.output_tokens
        else:
            before = "".join(text for turn in history for text in turn)
            body["prompt"] = before + prompt.content if isinstance(prompt.content, str) else prompt.content
            body["max_tokens"] = prompt.output_tokens
        return {**body, **options.sampling, **(options.extra_body or {})}
