"""Neurons over HTTP: those that the reference computes, of each token, whoever else is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.http.responses import tokens as shown
from bdh_batch.kernels.base import RaggedBatch
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Neurons

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
CONFORMANCE = Path(__file__).parents[1] / "data" / "conformance"
PROMPT = "Neither a borrower nor a lender be; for loan oft loses both itself and friend, and borrowing dulls."
TOLERANCE = 1e-4


@cache
def model() -> Any:
    return load_model(CONFORMANCE / "tiny", torch.float32, torch.device("cpu"))


def fired_by(tokens: list[int]) -> torch.Tensor:
    """What the reference computes for a sequence: [T, layers, heads · N]."""
    config, count = model().config, len(tokens)
    states = torch.zeros(1, config.n_layer, config.n_head, config.neurons_per_head, config.n_embd)
    fired = torch.zeros(config.n_layer, count, config.n_head, config.neurons_per_head)
    batch = RaggedBatch(torch.tensor(tokens), torch.arange(count), [0, count], [0], watched=range(count))
    TorchKernels(model().weights).forward(states, batch, fired=fired)
    return fired.flatten(2).transpose(0, 1)


def check(neurons: list[dict[str, Any]], tokens: list[int], before: list[int], top: int) -> None:
    """They are those of `tokens`, which come after `before`."""
    assert [each["token_id"] for each in neurons] == tokens
    expected = fired_by([*before, *tokens])[len(before) :]
    per_head = model().config.neurons_per_head
    for token, own in zip(neurons, expected, strict=True):
        for layer, fired in zip(token["layers"], own, strict=True):
            assert layer["active"] == pytest.approx(float((fired > 0).float().mean()), abs=2 / len(fired))
            values = [each["value"] for each in layer["strongest"]]
            numbers = [each["head"] * per_head + each["neuron"] for each in layer["strongest"]]
            assert all(each["neuron"] < per_head for each in layer["strongest"])
            assert len(set(numbers)) == len(numbers) <= top
            assert len(numbers) == top or len(numbers) == pytest.approx(int((fired > TOLERANCE).sum()), abs=2)
            assert values == sorted(values, reverse=True)
            assert all(value > 0 for value in values)
            assert values == pytest.approx(fired[numbers].tolist(), abs=TOLERANCE)
            assert values == pytest.approx(fired.topk(len(numbers)).values.tolist(), abs=TOLERANCE)


def ask(server: Server, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json={"temperature": 0, "return_token_ids": True} | body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def test_are_those_that_the_reference_computes_for_prompt_and_completion(tiny: Server) -> None:
    known = [*PROMPT.encode()]
    asked: dict[str, Any] = {"prompt": PROMPT, "max_tokens": 110, "ignore_eos": True, "neurons": {"top": 5}}
    (echoed,) = ask(tiny, echo=True, **asked)["choices"]
    assert len(known) + 110 > 200
    check(echoed["neurons"], known + echoed["token_ids"], [], 5)
    (silent,) = ask(tiny, **asked)["choices"]
    assert silent["neurons"] == echoed["neurons"][len(known) :]
    (unasked,) = ask(tiny, **asked | {"neurons": None})["choices"]
    assert silent == unasked | {"neurons": silent["neurons"]}


def test_of_a_prompt_alone(tiny: Server) -> None:
    (choice,) = ask(tiny, prompt="To be", max_tokens=0, echo=True, neurons={"top": 3})["choices"]
    check(choice["neurons"], [*b"To be"], [], 3)
    assert choice["text"] == "To be"


def test_of_each_choice_and_of_the_best(tiny: Server) -> None:
    asked: dict[str, Any] = {"prompt": ["a", "bc"], "temperature": 1, "seed": 4, "max_tokens": 9, "neurons": {}}
    for more in ({"n": 2}, {"n": 2, "best_of": 4, "logprobs": 0}):
        choices = ask(tiny, **asked | more)["choices"]
        for choice, prompt in zip(choices, [b"a", b"a", b"bc", b"bc"], strict=True):
            check(choice["neurons"], choice["token_ids"], [*prompt], 16)


@pytest.mark.parametrize("echo", [False, True])
@pytest.mark.parametrize("chunk", [1, 7])
def test_come_in_the_chunk_of_their_token(tiny: Server, chunk: int, echo: bool) -> None:
    asked: dict[str, Any] = {
        "prompt": "Whole",
        "max_tokens": 30,
        "temperature": 0,
        "return_token_ids": True,
        "neurons": {"top": 2},
    }
    whole = ask(tiny, **asked, echo=echo)["choices"][0]
    known, text, seen, ids = (5 if echo else 0), "", list[Any](), list[int]()
    for event in tiny.events(**asked, echo=echo, stream_options={"chunk_tokens": chunk}):
        for choice in event["choices"]:
            before = known if not ids else 0
            if choice["token_ids"]:
                assert [each["token_id"] for each in choice["neurons"][before:]] == choice["token_ids"]
                assert len(choice["token_ids"]) <= chunk
            seen += choice.get("neurons", [])
            ids += choice["token_ids"]
            text += choice["text"]
    assert (text, ids, seen) == (whole["text"], whole["token_ids"], whole["neurons"])


def test_of_chats(tiny: Server) -> None:
    asked: dict[str, Any] = {
        "messages": [{"role": "user", "content": "a"}],
        "max_tokens": 12,
        "temperature": 0,
        "neurons": {"top": 4},
    }
    (choice,) = ask(tiny, CHAT, **asked)["choices"]
    check(choice["neurons"], choice["token_ids"], [*b"user: a\nassistant:"], 4)
    events = tiny.events(CHAT, **asked)
    streamed = [each for event in events for choice in event["choices"] for each in choice.get("neurons", [])]
    assert streamed == choice["neurons"]
    tools = [{"type": "function", "function": {"name": "f"}}]
    called = ask(tiny, CHAT, **asked, tools=tools)["choices"][0]
    assert [each["token_id"] for each in called["neurons"]] == called["token_ids"]


def test_are_of_all_tokens_where_a_stop_string_cuts_the_text(tiny: Server) -> None:
    asked: dict[str, Any] = {"prompt": "Cut", "max_tokens": 40, "neurons": {"top": 1}}
    (choice,) = ask(tiny, **asked)["choices"]
    stop = choice["text"][9:12]
    (cut,) = ask(tiny, **asked, stop=stop)["choices"]
    assert cut["finish_reason"] == "stop"
    assert stop not in cut["text"]
    check(cut["neurons"], cut["token_ids"], [*b"Cut"], 1)


def test_go_with_structured_output(tiny: Server) -> None:
    asked: dict[str, Any] = {
        "prompt": "a",
        "structured_outputs": {"regex": "[a-z]{5}"},
        "max_tokens": 20,
        "neurons": {"top": 1},
    }
    (choice,) = ask(tiny, **asked)["choices"]
    assert len(choice["text"]) == 5
    check(choice["neurons"], choice["token_ids"], [*b"a"], 1)


def test_nobody_else_gets_other_bytes(tiny: Server) -> None:
    prompts = [f"{number} in a crowd" for number in range(12)]
    plain = {"max_tokens": 40, "temperature": 1, "seed": 5, "logprobs": 1, "return_token_ids": True}
    alone = [tiny.complete(prompt=prompt, **plain)["choices"] for prompt in prompts]

    def one(at: int) -> list[dict[str, Any]]:
        more = {"neurons": {"top": 8}, "echo": at % 3 == 0} if at % 2 else {}
        choices: list[dict[str, Any]] = tiny.complete(prompt=prompts[at], **plain | more)["choices"]
        return choices

    with ThreadPoolExecutor(len(prompts)) as threads:
        together = [*threads.map(one, range(len(prompts)))]
    for at, (own, crowded) in enumerate(zip(alone, together)):
        if at % 2 == 0:
            assert own == crowded
        else:
            assert crowded[0]["token_ids"] == own[0]["token_ids"]
            before, after = ([], [*prompts[at].encode()]) if at % 3 == 0 else ([*prompts[at].encode()], [])
            check(crowded[0]["neurons"], after + own[0]["token_ids"], before, 8)
    tiny.until_idle()


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(
    ("value", "param"),
    [
        ({"top": 0}, "neurons.top"),
        ({"top": -1}, "neurons.top"),
        ({"top": 129}, "neurons.top"),
        ({"top": 10**30}, "neurons.top"),
        ({"top": "16"}, "neurons.top"),
        ({"top": True}, "neurons.top"),
        ({"top": 1.5}, "neurons.top"),
        ({"top": [1]}, "neurons.top"),
        ({"bottom": 1}, "neurons.bottom"),
        (True, "neurons"),
        (16, "neurons"),
        ("all", "neurons"),
        ([{"top": 1}], "neurons"),
    ],
)
def test_bad_values_are_refused_by_name(tiny: Server, path: str, value: object, param: str) -> None:
    given = {"prompt": "a"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "a"}]}
    assert tiny.refusal(given | {"neurons": value}, path)["param"] == param


def test_null_asks_for_nothing_and_an_empty_object_for_sixteen(tiny: Server) -> None:
    assert "neurons" not in ask(tiny, prompt="a", max_tokens=1, neurons=None)["choices"][0]
    for given in ({}, {"top": None}):
        (choice,) = ask(tiny, prompt="a", max_tokens=1, neurons=given)["choices"]
        check(choice["neurons"], choice["token_ids"], [*b"a"], 16)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/responses", {"input": "a"}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
def test_other_endpoints_refuse_them_by_name(tiny: Server, path: str, body: dict[str, Any]) -> None:
    response = tiny.http.post(path, json={"model": "tiny", **body, "neurons": {"top": 1}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "neurons"


def test_tensors_refuse_them_by_name(tiny: Server) -> None:
    inputs = [{"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["a"]}]
    body = {"inputs": inputs, "parameters": {"neurons": '{"top": 1}'}}
    assert "neurons" in tiny.http.post("/v2/models/tiny/infer", json=body).json()["error"]


@pytest.fixture(scope="module")
def narrow(serve: ServeFactory) -> Iterator[Server]:
    """A server that shows few neurons, with an engine in a process of its own, and keeps responses."""
    options = ("limits.max_neurons=600", "engine.replicas=1", "engine.threads=1", "response_cache.enabled=true")
    with serve(*options, model=CONFORMANCE / "tiny") as server:
        yield server


def test_a_response_that_would_show_too_many_is_refused(narrow: Server) -> None:
    layers = model().config.n_layer
    fits = 600 // layers // 10
    asked: dict[str, Any] = {"prompt": "abc", "neurons": {"top": 10}, "temperature": 0}
    assert len(narrow.complete(**asked, max_tokens=fits)["choices"][0]["neurons"]) == fits
    for more in ({"max_tokens": fits + 1}, {"max_tokens": fits - 2, "echo": True}, {"max_tokens": fits, "n": 2}):
        refused = narrow.refusal(asked | more)
        assert refused["param"] == "neurons.top"
        assert "limits.max_neurons" in refused["message"]


def test_cross_from_an_engine_s_process_and_are_kept_with_a_response(narrow: Server) -> None:
    asked: dict[str, Any] = {
        "prompt": "kept",
        "max_tokens": 8,
        "temperature": 0,
        "return_token_ids": True,
        "neurons": {"top": 3},
    }
    first = narrow.http.post(COMPLETIONS, json=asked)
    again = narrow.http.post(COMPLETIONS, json=asked)
    assert again.headers["x-cache"] == "hit"
    (choice,) = first.json()["choices"]
    assert again.json()["choices"] == [choice]
    check(choice["neurons"], choice["token_ids"], [*b"kept"], 3)
    other = narrow.http.post(COMPLETIONS, json=asked | {"neurons": {"top": 2}})
    assert other.headers["x-cache"] == "miss"


@hypothesis.given(st.lists(st.lists(st.floats(0, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=4))
def test_are_encoded_without_those_that_did_not_fire_and_in_few_digits(drawn: list[list[float]]) -> None:
    values = -np.sort(-np.array(drawn, "<f4"), axis=1)
    numbers = np.arange(values.size, dtype="<u4").reshape(values.shape) * 7
    active = np.linspace(0.1, 0.3, len(values), dtype="<f4")
    entry = Neurons(5, 4, active.tobytes(), numbers.tobytes(), values.tobytes())
    assert json.loads(shown.fired(entry)) == {
        "token_id": 5,
        "layers": [
            {
                "active": float(str(share)),
                "strongest": [
                    {"head": number // 4, "neuron": number % 4, "value": float(str(value))}
                    for number, value in zip(own.tolist(), row)
                    if value > 0
                ],
            }
            for share, own, row in zip(active, numbers, values)
        ],
    }
