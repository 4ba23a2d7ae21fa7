"""The table of endpoints, from which routing, access and the OpenAPI document are made.

The examples are of the bundled model; a test holds them to a server.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

from bdh_batch import __version__
from bdh_batch.http.anthropic.endpoints import messages
from bdh_batch.http.docs.endpoint import MODEL, UPSTREAM, WORK, Endpoint, Open
from bdh_batch.http.docs.examples import CARD, CHAT, COMPLETION, EMBEDDINGS, ENTER, NAME, QUESTION, READY, TOKENS
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
    Success,
    Tokenization,
    TokenizerInfo,
    Version,
)
from bdh_batch.http.kserve.endpoints import kserve
from bdh_batch.http.neurons.endpoints import neurons
from bdh_batch.http.responses_api.endpoints import responses
from bdh_batch.http.schema.requests import ChatBody, CompletionBody
from bdh_batch.http.schema.text import (
    DetokenizeBody,
    EmbeddingBody,
    EmbeddingChat,
    ModelBody,
    TokenizeChat,
    TokenizeText,
)
from bdh_batch.http.states.endpoints import states
from bdh_batch.http.watch.endpoints import watch
from bdh_batch.settings import Auth

TAGS = {
    "Generation": "Completions of the model, as in OpenAI's API.",
    "Responses": "Conversations that are stored, as in OpenAI's Responses API and Open Responses.",
    "States": "What a model remembers of tokens, saved: requests begin in it, any number of times.",
    "Messages": "Conversations, as in Anthropic's API.",
    "Tokens": "Text to tokens and back.",
    "Models": "What is served.",
    "KServe": "KServe v2, the Open Inference Protocol: any parameter of completions is a tensor or a parameter.",
    "Operation": "For probes, load balancers and monitoring.",
}


UI = "/ui"
HEALTH = (("", "/health"), ("2", "/healthz"), ("3", "/livez"))


def _generation() -> list[Endpoint]:
    stream = "With `stream`, the response is server-sent events; the last is `data: [DONE]`, or an error."
    return [
        Endpoint(
            "createCompletion",
            "completions",
            "Generation",
            "/v1/completions",
            "Complete a text",
            Completion,
            "post",
            stream,
            bodies=[CompletionBody],
            event=CompletionChunk,
            errors=MODEL + WORK + UPSTREAM,
            requests={
                "text": {"model": NAME, "prompt": "ROMEO:\n", "max_tokens": 24, "temperature": 0},
                "stream": {"prompt": "ROMEO:\n", "max_tokens": 24, "stream": True},
                "structured output": {
                    "prompt": "The colour is ",
                    "structured_outputs": {"choice": ["red", "green"]},
                    "n": 2,
                    "seed": 1,
                },
                "token ids": {"prompt": [82, 79, 77, 69, 79, 58], "max_tokens": 2, "return_token_ids": True},
                "log-probabilities of a text": {"prompt": "To be", "echo": True, "logprobs": 0, "max_tokens": 0},
            },
            replies={"text": COMPLETION},
        ),
        Endpoint(
            "createChatCompletion",
            "chat_completions",
            "Generation",
            "/v1/chat/completions",
            "Continue a conversation",
            ChatCompletion,
            "post",
            stream,
            bodies=[ChatBody],
            event=ChatCompletionChunk,
            errors=MODEL + WORK + UPSTREAM,
            requests={
                "conversation": {"messages": [QUESTION], "max_tokens": 24, "temperature": 0},
                "stream": {"messages": [QUESTION], "max_tokens": 24, "stream": True},
                "tools": {"messages": [QUESTION], "tools": [ENTER], "tool_choice": "required", "max_tokens": 80},
            },
            replies={"conversation": CHAT},
        ),
        Endpoint(
            "createEmbedding",
            "embeddings",
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


def _tokens() -> list[Endpoint]:
    found = []
    for root, suffix in (("", ""), ("/v1", "V1")):
        found += [
            Endpoint(
                f"tokenize{suffix}",
                "tokenize",
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
            Endpoint(
                f"detokenize{suffix}",
                "detokenize",
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
        Endpoint(
            "getTokenizerInfo",
            "tokenizer_info",
            "Tokens",
            "/tokenizer_info",
            "The tokenizer: its special tokens and its vocabulary",
            TokenizerInfo,
            errors=MODEL,
            replies={"bytes": info},
        ),
    ]


def _models() -> list[Endpoint]:
    return [
        Endpoint(
            "listModels",
            "models",
            "Models",
            "/v1/models",
            "The models that the caller may use, under each of their names; same `fingerprint`, same texts",
            ModelList,
            errors=(503,),
            replies={"models": {"object": "list", "data": [CARD]}},
        ),
        Endpoint(
            "getModel",
            "model",
            "Models",
            "/v1/models/{id}",
            "A model by its name or an alias",
            ModelCard,
            errors=MODEL,
            replies={"model": CARD},
        ),
        *(
            Endpoint(
                f"{verb}Model",
                f"{verb}_model",
                "Models",
                f"/models/{verb}",
                f"{verb.capitalize()} a model of several; for operators' keys",
                Success,
                "post",
                text,
                bodies=[ModelBody],
                errors=(*MODEL, *errors),
                requests={"model": {"model": NAME}},
            )
            for verb, text, errors in (
                ("load", "Responds when the model is loaded.", ()),
                ("unload", "Responds when its requests have ended and it is unloaded.", (409,)),
            )
        ),
        Endpoint(
            "getServerInfo",
            "server_info",
            "Models",
            "/server_info",
            "Version, model, and the settings that any client may know",
            ServerInfo,
            errors=MODEL,
        ),
    ]


def _operation() -> list[Endpoint]:
    well = {"well": {"status": "ok"}}
    alive = "503 where the engine is dead, or has work and made no step for `health.stall_seconds`."
    probes = [
        *(("isHealthy" + suffix, "health", path, "Alive and making progress?", alive, well) for suffix, path in HEALTH),
        *(
            ("isReady" + suffix, "ready", path, "Ready for requests?", "503 while loading and draining.", READY)
            for suffix, path in (("", "/readyz"), ("2", "/ready"))
        ),
    ]
    return [
        *(
            Endpoint(
                *(id, handler, "Operation", path, summary, Status),
                description=text,
                errors=(503,),
                replies=replies,
                open=Open.ALWAYS,
            )
            for id, handler, path, summary, text, replies in probes
        ),
        *(
            Endpoint(
                *(f"ping{suffix}", "ping", "Operation", "/ping", "Alive? Without a body", None, method),
                errors=(503,),
                open=Open.ALWAYS,
            )
            for method, suffix in (("get", ""), ("post", "Post"))
        ),
        Endpoint(
            "getVersion",
            "version",
            "Operation",
            "/version",
            "The server's version",
            Version,
            replies={"version": {"version": __version__}},
            open=Open.ALWAYS,
        ),
        Endpoint(
            "getLoad",
            "load",
            "Operation",
            "/load",
            "Requests under way",
            Load,
            replies={"load": {"server_load": 0}},
            open=Open.ALWAYS,
        ),
        Endpoint(
            "getMetrics",
            "metrics",
            "Operation",
            "/metrics",
            "Metrics for Prometheus",
            "text/plain",
            open=Open.METRICS,
        ),
        Endpoint(
            "getRoot",
            "root",
            "Operation",
            "/",
            "Name, version and status of the server",
            Root,
            replies={"ready": {"name": "bdh_batch", "version": __version__, "status": "ready"}},
            open=Open.ALWAYS,
        ),
        *(
            Endpoint(*(id, id, "Operation", path, summary, media), open=Open.DOCS, documented=False)
            for id, path, summary, media in (
                ("openapi", "/openapi.json", "The OpenAPI document", "application/json"),
                ("docs", "/docs", "The same as a page", "text/html"),
            )
        ),
        *(
            Endpoint(*(id, f"pages.{id}", "Operation", path, summary, "text/html"), open=Open.ALWAYS, documented=False)
            for id, path, summary in (
                ("page", UI, "The page to talk to the model, and to watch the server"),
                ("file", f"{UI}/{{id}}", "A file of that page"),
            )
        ),
    ]


ENDPOINTS = (
    *_generation(),
    *responses(),
    *states(),
    *messages(),
    *_tokens(),
    *_models(),
    *neurons(),
    *_operation(),
    *watch(),
    *kserve(),
)


class Paths(Container[str]):
    """Paths of endpoints. What is below /ui is a path, too: its files."""

    def __init__(self, templates: Iterable[str]) -> None:
        self._exact = frozenset(templates)
        self._files = f"{UI}/{{id}}" in self._exact

    def __contains__(self, path: object) -> bool:
        return path in self._exact or (self._files and isinstance(path, str) and path.startswith(f"{UI}/"))


def open_paths(auth: Auth) -> Paths:
    """What anyone may ask for as often as they like; every other path is for callers."""
    closed: set[Open | None] = {None}
    if auth.protect_metrics:
        closed.add(Open.METRICS)
    if auth.protect_docs:
        closed.add(Open.DOCS)
    return Paths(each.path for each in ENDPOINTS if each.open not in closed)
