"""The endpoints as the OpenAPI document tells of them: what each takes and gives, with examples of the bundled model.

A test holds this table to the routes, and the examples to a server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import BaseModel

from bdh_batch import __version__
from bdh_batch.http.docs.response_types import (
    ChatCompletion,
    ChatCompletionChunk,
    Completion,
    CompletionChunk,
    Detokenization,
    Embeddings,
    Load,
    ModelCard,
    ModelList,
    Root,
    ServerInfo,
    Status,
    Tokenization,
    TokenizerInfo,
    Version,
)
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import DetokenizeBody, EmbeddingBody, EmbeddingChat, TokenizeChat, TokenizeText

MODEL = (403, 404, 503)  # of all that asks for the model
WORK = (429, 504)  # of all that the engine works on
TAGS = {
    "Generation": "Answers of the model, as OpenAI's API has them.",
    "Tokens": "Text to tokens and back.",
    "Models": "What is served.",
    "Operation": "For probes, load balancers and monitoring.",
}


@dataclass(frozen=True)
class Operation:
    """
    Args:
        bodies: of which the request has one; none takes no body.
        answer: of status 200; a text is a media type, None an empty body.
        event: the chunk of a stream, where there can be one.
        errors: statuses that are not possible everywhere.
        requests: example bodies by name.
        replies: example answers by name.
    """

    id: str
    tag: str
    path: str
    summary: str
    answer: type[BaseModel] | str | None
    method: str = "get"
    description: str = ""
    bodies: Sequence[type[BaseModel]] = ()
    event: type[BaseModel] | None = None
    errors: Sequence[int] = ()
    requests: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    replies: Mapping[str, Any] = field(default_factory=dict)

    @property
    def generates(self) -> bool:
        return 504 in self.errors


def operations() -> list[Operation]:
    return [*_generation(), *_tokens(), *_models(), *_operation()]


NAME = "bdh-shakespeare"
FINGERPRINT = f"{NAME}-bdh_batch-{__version__}"
CARD: dict[str, Any] = {
    "id": NAME,
    "object": "model",
    "created": 1762000000,
    "owned_by": "bdh_batch",
    "root": NAME,
    "max_model_len": 131072,
}
QUESTION = {"role": "user", "content": "Who is there?"}
ENTER = {
    "type": "function",
    "function": {
        "name": "enter",
        "parameters": {
            "type": "object",
            "properties": {"who": {"enum": ["Romeo", "Juliet"]}},
            "required": ["who"],
            "additionalProperties": False,
        },
    },
}
TOKENS: dict[str, Any] = {"count": 6, "max_model_len": 131072, "tokens": [82, 79, 77, 69, 79, 58]}
HEALTH = (("", "/health"), ("2", "/healthz"), ("3", "/livez"))
READY = {"ready": {"status": "ready"}}
CREATED = 1795258833
COMPLETION = {
    "id": "cmpl-5e98699d240a456f81799003ee556f84",
    "object": "text_completion",
    "created": CREATED,
    "model": NAME,
    "system_fingerprint": FINGERPRINT,
    "choices": [
        {
            "index": 0,
            "text": "I think the state of the",
            "logprobs": None,
            "finish_reason": "length",
            "prompt_logprobs": None,
            "prompt_token_ids": None,
            "token_ids": None,
        }
    ],
    "usage": {
        "prompt_tokens": 7,
        "completion_tokens": 24,
        "total_tokens": 31,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
}
CHAT = {
    "id": "chatcmpl-035e67a47bbc407eb348d3a77f2e978a",
    "object": "chat.completion",
    "created": CREATED,
    "model": NAME,
    "system_fingerprint": FINGERPRINT,
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": " the world of the countr", "refusal": None},
            "logprobs": None,
            "finish_reason": "length",
            "token_ids": None,
        }
    ],
    "usage": {
        "prompt_tokens": 30,
        "completion_tokens": 24,
        "total_tokens": 54,
        "prompt_tokens_details": {"cached_tokens": 0},
    },
    "prompt_logprobs": None,
    "prompt_token_ids": None,
}
EMBEDDINGS = {
    "object": "list",
    "data": [{"object": "embedding", "index": 0, "embedding": [0.76557013, -0.00099519, 0.64335168]}],
    "model": NAME,
    "usage": {"prompt_tokens": 15, "total_tokens": 15},
}


def _generation() -> list[Operation]:
    stream = "With `stream`, the answer is server-sent events; the last is `data: [DONE]`, or an error."
    return [
        Operation(
            "createCompletion",
            "Generation",
            "/v1/completions",
            "Continue a text",
            Completion,
            "post",
            stream,
            bodies=[CompletionBody],
            event=CompletionChunk,
            errors=MODEL + WORK,
            requests={
                "text": {"model": NAME, "prompt": "ROMEO:\n", "max_tokens": 24, "temperature": 0},
                "stream": {"prompt": "ROMEO:\n", "max_tokens": 24, "stream": True},
                "answers of a given form": {
                    "prompt": "The colour is ",
                    "structured_outputs": {"choice": ["red", "green"]},
                    "n": 2,
                    "seed": 1,
                },
                "token ids": {"prompt": [82, 79, 77, 69, 79, 58], "max_tokens": 2, "return_token_ids": True},
                "scores of a text": {"prompt": "To be", "echo": True, "logprobs": 0, "max_tokens": 0},
            },
            replies={"text": COMPLETION},
        ),
        Operation(
            "createChatCompletion",
            "Generation",
            "/v1/chat/completions",
            "Answer a conversation",
            ChatCompletion,
            "post",
            stream,
            bodies=[ChatBody],
            event=ChatCompletionChunk,
            errors=MODEL + WORK,
            requests={
                "conversation": {"messages": [QUESTION], "max_tokens": 24, "temperature": 0},
                "stream": {"messages": [QUESTION], "max_tokens": 24, "stream": True},
                "tools": {"messages": [QUESTION], "tools": [ENTER], "tool_choice": "required", "max_tokens": 80},
            },
            replies={"conversation": CHAT},
        ),
        Operation(
            "createEmbedding",
            "Generation",
            "/v1/embeddings",
            "Texts to vectors",
            Embeddings,
            "post",
            "The mean of the final hidden vectors over a text's tokens, of length 1.",
            bodies=[EmbeddingBody, EmbeddingChat],
            errors=MODEL + WORK,
            requests={
                "text": {"input": "O Romeo, Romeo!", "dimensions": 3},
                "texts": {"input": ["O Romeo!", "O Juliet!"], "encoding_format": "base64"},
                "conversation": {"messages": [QUESTION]},
            },
            replies={"text": EMBEDDINGS},
        ),
    ]


def _tokens() -> list[Operation]:
    found = []
    for root, suffix in (("", ""), ("/v1", "V1")):
        found += [
            Operation(
                f"tokenize{suffix}",
                "Tokens",
                f"{root}/tokenize",
                "Text, or a conversation, to tokens",
                Tokenization,
                "post",
                bodies=[TokenizeText, TokenizeChat],
                errors=MODEL,
                requests={
                    "text": {"prompt": "ROMEO:", "return_token_strs": True},
                    "conversation": {"messages": [QUESTION]},
                },
                replies={"text": TOKENS | {"token_strs": ["R", "O", "M", "E", "O", ":"]}},
            ),
            Operation(
                f"detokenize{suffix}",
                "Tokens",
                f"{root}/detokenize",
                "Tokens to text",
                Detokenization,
                "post",
                bodies=[DetokenizeBody],
                errors=MODEL,
                requests={"tokens": {"tokens": TOKENS["tokens"]}},
                replies={"tokens": {"prompt": "ROMEO:"}},
            ),
        ]
    info: dict[str, Any] = {
        "tokenizer_class": "ByteTokenizer",
        "bos_token": None,
        "eos_token": None,
        "eos_token_ids": [],
        "prefix_token": "\n",
        "prefix_token_id": 10,
        "vocab_size": 256,
    }
    return [
        *found,
        Operation(
            "getTokenizerInfo",
            "Tokens",
            "/tokenizer_info",
            "The tokenizer: its special tokens and its vocabulary",
            TokenizerInfo,
            errors=MODEL,
            replies={"bytes": info},
        ),
    ]


def _models() -> list[Operation]:
    return [
        Operation(
            "listModels",
            "Models",
            "/v1/models",
            "The models that the caller may use, under each of their names",
            ModelList,
            errors=(503,),
            replies={"models": {"object": "list", "data": [CARD]}},
        ),
        Operation(
            "getModel",
            "Models",
            "/v1/models/{id}",
            "A model by its name or an alias",
            ModelCard,
            errors=MODEL,
            replies={"model": CARD},
        ),
        Operation(
            "getServerInfo",
            "Models",
            "/server_info",
            "Version, model, and the settings that any client may know",
            ServerInfo,
            errors=MODEL,
        ),
    ]


def _operation() -> list[Operation]:
    well = {"well": {"status": "ok"}}
    alive = "503 where the engine is dead, or has had work and made no step for `health.stall_seconds`."
    probes = [
        *(("isHealthy" + suffix, path, "Alive and making progress?", alive, well) for suffix, path in HEALTH),
        *(
            ("isReady" + suffix, path, "Ready for requests?", "503 while loading and draining.", READY)
            for suffix, path in (("", "/readyz"), ("2", "/ready"))
        ),
    ]
    return [
        *(
            Operation(id, "Operation", path, summary, Status, description=text, errors=(503,), replies=replies)
            for id, path, summary, text, replies in probes
        ),
        *(
            Operation(f"ping{suffix}", "Operation", "/ping", "Alive? Without a body", None, method, errors=(503,))
            for method, suffix in (("get", ""), ("post", "Post"))
        ),
        Operation(
            "getVersion",
            "Operation",
            "/version",
            "The server's version",
            Version,
            replies={"version": {"version": __version__}},
        ),
        Operation(
            "getLoad",
            "Operation",
            "/load",
            "Requests under way",
            Load,
            replies={"load": {"server_load": 0}},
        ),
        Operation(
            "getMetrics",
            "Operation",
            "/metrics",
            "Metrics for Prometheus",
            "text/plain",
        ),
        Operation(
            "getRoot",
            "Operation",
            "/",
            "Name, version and status of the server",
            Root,
            replies={"ready": {"name": "bdh_batch", "version": __version__, "status": "ready"}},
        ),
    ]
