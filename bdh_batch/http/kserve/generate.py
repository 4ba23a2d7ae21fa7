"""The responses of `generate` and `generate_stream`: one JSON object for one completion, or one for each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from bdh_batch.errors import BDHError
from bdh_batch.http.errors import describe, kserve_error
from bdh_batch.http.responses.frames import CompletionFrames, ResponseOptions, usage_dict
from bdh_batch.http.responses.json_pieces import dump_list, dump_text
from bdh_batch.messages import Delta, Usage
from bdh_batch.text.tokenizer import Tokenizer

# What the text is called in a whole response and in an event, by what the prompt was called in the request.
TEXTS = {"text_input": ("text_output", "text_output"), "prompt": ("text", "token")}


class GenerateFrames(CompletionFrames):
    """Encodes one request's response.

    Args:
        envelope: the members that all objects begin with.
        prompt_name: what the request calls the prompt.
    """

    def __init__(
        self, options: ResponseOptions, tokenizer: Tokenizer, envelope: Mapping[str, Any], prompt_name: str
    ) -> None:
        super().__init__(options, tokenizer)
        self.only_text = False
        self._envelope = orjson.dumps(envelope)[:-1]
        whole, event = TEXTS[prompt_name]
        self._whole_text, self._event_text = b',"%b":' % whole.encode(), b',"%b":' % event.encode()
        self._reason = "null"
        self._so_far = b""
        self._left_out = b""

    def warn(self, warnings: Sequence[Mapping[str, str]]) -> None:
        self._left_out = b',"warnings":' + orjson.dumps(list(warnings)) if warnings else b""

    def opening(self, prompts: Sequence[Sequence[int]]) -> bytes:
        self._begin(prompts)
        return b""

    def delta(self, index: int, delta: Delta) -> list[bytes]:
        text, logprobs = self._parts(index, delta)
        if delta.finish_reason is not None:
            self._reason = f'"{delta.finish_reason}"'
        if not (text or delta.logprobs or (self._options.token_ids and delta.tokens)):
            return []
        parts = self._members(self._event_text, text, logprobs, delta.tokens)
        return [b"data: ", self._envelope, *parts, b',"finish_reason":null,"done":false', self._so_far, b"}\n\n"]

    def report_usage(self, usage: Usage) -> None:
        self._so_far = b',"usage":' + orjson.dumps(usage_dict(usage))

    def closing(self, usage: Usage) -> bytes:
        self.report_usage(usage)
        parts = self._members(self._event_text, "", [b"null"], [])
        reason = b',"finish_reason":%b,"done":true' % self._reason.encode()
        return b"".join([b"data: ", self._envelope, *parts, reason, self._so_far, self._left_out, b"}\n\n"])

    def failed(self, error: BDHError) -> bytes:
        _, body = describe(error)
        return b"data: " + orjson.dumps(kserve_error(body["error"])) + b"\n\n"

    def whole(self, prompts: Sequence[Sequence[int]], usage: Usage, ends: Sequence[Delta]) -> list[bytes]:
        self._begin(prompts)
        (row,) = self._best(ends)
        text, logprobs = self._parts(row, ends[row])
        self.report_usage(usage)
        parts = self._members(self._whole_text, text, logprobs, ends[row].tokens)
        reason = b',"finish_reason":"%b"' % str(ends[row].finish_reason).encode()
        return [self._envelope, *parts, reason, self._so_far, self._left_out, b"}"]

    def _members(self, name: bytes, text: str, logprobs: Sequence[bytes], tokens: Sequence[int]) -> list[bytes]:
        found = [name, *dump_text(text)]
        if self._options.logprobs is not None:
            found += [b',"logprobs":', *logprobs]
        if self._options.token_ids:
            found += [b',"token_ids":', dump_list(tokens)]
        return found
