"""What a request to generate has of its client, besides what its body says."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.requests import Request

from bdh_batch.backends.local import LocalBackend
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.auth.caller import Caller, by_key
from bdh_batch.http.auth.keys import Key
from bdh_batch.http.prepare import Preparation
from bdh_batch.http.request.client import Client
from bdh_batch.http.request.off_loop import OffLoop
from bdh_batch.http.schema.requests import CompletionBody, Defaults
from bdh_batch.messages import GenerationRequest
from bdh_batch.observability.access import Account
from bdh_batch.text.tokenizer import ByteTokenizer

KEY = Key(sha256="b" * 64, weight=3.0)


def prepared(caller: Caller, timeout: str | None = None, **fields: Any) -> GenerationRequest:
    headers = [] if timeout is None else [(b"x-request-timeout", timeout.encode())]
    state = {"caller": caller, "id": "r-1", "span": None, "standing": {}, "cleanup": ExitStack(), "account": Account()}
    request = Request({"type": "http", "headers": headers, "state": state})
    backend = LocalBackend(SimpleNamespace(), ByteTokenizer(), 256, None, 60.0)
    model: Any = SimpleNamespace(backend=backend, defaults=Defaults(), max_model_len=None)
    records: Any = None  # which nothing here is in
    preparation = Preparation(Client.of(request), model, 100, OffLoop().of(caller.label), records, 2**19)
    return asyncio.run(preparation.generation(CompletionBody(prompt=["ab", "c"], **fields)))


@pytest.mark.parametrize(
    ("caller", "namespace", "tenant", "weight"), [(by_key(KEY), KEY.id, KEY.id, 3.0), (Caller("ann"), "", "ann", None)]
)
def test_it_is_its_callers(caller: Caller, namespace: str, tenant: str, weight: float | None) -> None:
    origin = prepared(caller).origin
    assert (origin.id, origin.cache_namespace, origin.tenant, origin.weight) == ("r-1", namespace, tenant, weight)


def test_it_has_its_clients_timeout() -> None:
    assert prepared(Caller("ann")).origin.timeout is None
    assert prepared(Caller("ann"), "2.5").origin.timeout == 2.5
    for wrong in ("0", "-1", "nan", "inf", "soon", "86401"):
        with pytest.raises(InvalidRequest) as refused:
            prepared(Caller("ann"), wrong)
        assert refused.value.param == "x-request-timeout"


def test_its_prompts_are_tokens_and_each_has_its_choices() -> None:
    request = prepared(Caller("ann"), n=3, seed=7, max_tokens=5)
    assert [bytes(prompt.tokens) for prompt in request.prompts] == [b"ab", b"c"]
    assert list(request.seeds) == [7, 8, 9] * 2
    assert (request.prompt_tokens, request.most_tokens) == (3, 3 + 6 * 5)
