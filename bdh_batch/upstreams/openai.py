"""Upstreams that speak OpenAI's API: what the client wrote goes on as it is, and so does what comes back."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection, Mapping, Sequence
from contextlib import aclosing
from typing import Any

import orjson

from bdh_batch.upstreams.config import OpenAIUpstream
from bdh_batch.upstreams.protocol import MOST, EndpointFacts, Fault, FaultKind, Piece, TextRequest, reason_of, token_ids
from bdh_batch.upstreams.sse import events
from bdh_batch.upstreams.web import asked, described, is_alive, open_client, parsed, read_json

DONE = "[DONE]"
JSON = "application/json"
OURS = "bdh_batch"  # who owns the models of a server like this one
LARGEST_LIST = 2**20  # bytes of a list of models
MOST_CALLS = 1024  # of tools, in one event
THOUGHTS = ("reasoning_content", "reasoning")  # names of the same


class OpenAIConnector:
    """Speaks OpenAI's API."""

    takes_messages = True
    stops = True

    def __init__(self, upstream: OpenAIUpstream) -> None:
        self._upstream = upstream
        self._client = open_client(upstream)

    def expresses(self, chat: bool, ours: bool) -> Collection[str] | None:
        return None

    async def stream(self, address: str, request: TextRequest) -> AsyncGenerator[Piece, None]:
        chat = request.messages is not None
        url = f"{address}/chat/completions" if chat else f"{address}/completions"
        async with asked(self._client, "POST", url, request.headers, self._body(request)) as response:
            kind = response.headers.get("content-type", "").partition(";")[0].strip()
            if kind == JSON:  # it does not stream
                value = await read_json(response, self._upstream.max_message_bytes)
                yield _piece(value, chat)
                return
            async with aclosing(events(response, self._upstream.max_message_bytes)) as source:
                async for event in source:
                    if event.data == DONE:
                        return
                    if event.data:
                        yield _piece(parsed(event.data), chat)

    async def probe(self, address: str) -> EndpointFacts:
        try:
            async with asked(self._client, "GET", f"{address}/models", {}) as response:
                value = await read_json(response, LARGEST_LIST)
        except Fault as fault:
            if is_alive(fault):
                return EndpointFacts()
            raise
        models = value.get("data") if isinstance(value, dict) else None
        listed = models if isinstance(models, list) else []
        mine = [each for each in listed if isinstance(each, dict) and each.get("id") == self._model]
        ours = next((each for each in mine if each.get("owned_by") == OURS), None)
        fingerprint = None if ours is None else ours.get("fingerprint")
        return EndpointFacts(ours is not None, fingerprint if isinstance(fingerprint, str) else None)

    async def prompt_ids(self, address: str, request: TextRequest) -> Sequence[int] | None:
        return None  # they come with the first event

    async def close(self) -> None:
        await self._client.aclose()

    @property
    def _model(self) -> str:
        return self._upstream.model or self._upstream.id

    def _body(self, request: TextRequest) -> dict[str, Any]:
        body = {**request.fields, "model": self._model, "stream": True}
        if self._upstream.include_usage:
            body["stream_options"] = {"include_usage": True}
        if request.continuable:
            body["return_token_ids"] = True
        if request.messages is not None:
            return body | {"messages": request.messages}
        prompt = request.prompt if isinstance(request.prompt, str) else [*(request.prompt or ())]
        return body | {"prompt": prompt}


def _piece(value: object, chat: bool) -> Piece:
    """Returns what an event, or a whole response, says. Raises Fault where it is none."""
    if not isinstance(value, dict):
        raise Fault(FaultKind.MALFORMED, "no object")
    if value.get("error") is not None:
        raise Fault(FaultKind.ERROR, described(value)[0])
    choices = value.get("choices")
    if not isinstance(choices, list) or not isinstance(choices[0] if choices else {}, dict):
        raise Fault(FaultKind.MALFORMED, "no list of choices")
    if len(choices) > 1 or (choices and choices[0].get("index") not in (None, 0)):
        raise Fault(FaultKind.WRONG_REQUEST, "a choice that was not asked for")
    piece = _choice(choices[0], chat) if choices else Piece()
    _read_usage(value.get("usage"), piece)
    if piece.prompt_ids is None:
        piece.prompt_ids = _tokens(value.get("prompt_token_ids")) or None
    return piece


def _choice(choice: Mapping[str, Any], chat: bool) -> Piece:
    members = (choice.get("delta") or choice.get("message") or {}) if chat else choice
    if not isinstance(members, dict):
        raise Fault(FaultKind.MALFORMED, "no object in a choice")
    text, reason = members.get("content" if chat else "text"), choice.get("finish_reason")
    if not isinstance(text, str | None) or not isinstance(reason, str | None):
        raise Fault(FaultKind.MALFORMED, "no text in a choice")
    tokens, stop = _tokens(choice.get("token_ids")), choice.get("stop_reason")  # vLLM's, of other kinds, too
    return Piece(
        text or "",
        tokens,
        len(tokens) if "token_ids" in choice else None,
        reason_of(reason) if reason else None,
        _extras(members if chat else {}, choice.get("logprobs")),
        prompt_ids=_tokens(choice.get("prompt_token_ids")) or None,
        stop=stop if isinstance(stop, str) else None,
    )


def _extras(members: Mapping[str, Any], logprobs: object) -> Mapping[str, Any] | None:
    """Returns what is passed on beside the text. Raises Fault where it is not what it should be."""
    delta: dict[str, Any] = {}
    thoughts = next((members[name] for name in THOUGHTS if members.get(name)), None)
    for name, said in (("reasoning_content", thoughts), ("refusal", members.get("refusal"))):
        if not isinstance(said, str | None):
            raise Fault(FaultKind.MALFORMED, f"{name} is no text")
        if said:
            delta[name] = said
    if calls := members.get("tool_calls"):
        delta["tool_calls"] = _calls(calls)
    if isinstance(logprobs, dict):
        try:
            orjson.dumps(logprobs)  # what is nested too deep could not be sent
        except orjson.JSONEncodeError as error:
            raise Fault(FaultKind.MALFORMED, "logprobs") from error
        lists = {name: each for name, each in logprobs.items() if isinstance(each, list | None)}
        return {"delta": delta, "logprobs": lists}
    return {"delta": delta} if delta else None


def _calls(calls: object) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or len(calls) > MOST_CALLS:
        raise Fault(FaultKind.MALFORMED, f"tool_calls are no list of at most {MOST_CALLS}")
    return [_call(index, call) for index, call in enumerate(calls)]


def _call(at: int, call: object) -> dict[str, Any]:
    function = call.get("function") or {} if isinstance(call, dict) else None
    if not isinstance(call, dict) or not isinstance(function, dict) or type(call.get("index", at)) is not int:
        raise Fault(FaultKind.MALFORMED, "a tool call is no object")
    known = {name: call[name] for name in ("id", "type") if isinstance(call.get(name), str)}
    said = {name: function[name] for name in ("name", "arguments") if isinstance(function.get(name), str)}
    return {"index": call.get("index", at), **known, "function": said}


def _tokens(value: object) -> list[int]:
    return [*token_ids(value)] if isinstance(value, list) and set(map(type, value)) <= {int} else []


def _read_usage(usage: object, piece: Piece) -> None:
    if not isinstance(usage, dict):
        return
    piece.estimated = usage.get("estimated") is True
    piece.prompt_tokens, piece.completion_tokens = _number(usage, "prompt_tokens"), _number(usage, "completion_tokens")
    details = usage.get("prompt_tokens_details")
    piece.cached_tokens = (_number(details, "cached_tokens") if isinstance(details, dict) else None) or 0


def _number(usage: Mapping[str, Any], name: str) -> int | None:
    value = usage.get(name)
    return value if type(value) is int and 0 <= value <= MOST else None
