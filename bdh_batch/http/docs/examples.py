"""Examples of requests and responses of the bundled model. A test holds them to a server."""

from __future__ import annotations

from typing import Any

from bdh_batch import __version__

NAME = "bdh-shakespeare"
FINGERPRINT = f"{NAME}-bdh_batch-{__version__}"
CARD: dict[str, Any] = {
    "id": NAME,
    "object": "model",
    "created": 1762000000,
    "owned_by": "bdh_batch",
    "root": NAME,
    "max_model_len": 131072,
    "fingerprint": "5f1d0bc2a7e94c0f8d36e1b2947a50c3",
    "status": {"value": "loaded"},
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
