"""The API by its tables, row by row, as the official client sees it; what each row does has tests elsewhere.

Here are the rows as a whole: that each is there, under its name, and comes in the types that the client declares.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import openai
import pytest
from openai import OpenAI
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam
from prometheus_client.parser import text_string_to_metric_families

from bdh_batch import __version__

if TYPE_CHECKING:
    from tests.conftest import Server

MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "a"}]
RENDERED = len("user: a\nassistant:")
TOKENS = [*b"ab"]


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[OpenAI]:
    with tiny.openai() as opened:
        yield opened


class TestEndpoints:
    @pytest.mark.parametrize("root", ["", "/v1"])
    def test_tokenize_and_detokenize_are_at_both_places(self, tiny: Server, root: str) -> None:
        reported = tiny.http.post(f"{root}/tokenize", json={"prompt": "ab"}).json()
        assert reported == {"tokens": TOKENS, "count": 2, "max_model_len": 131072, "token_strs": None}
        chat = tiny.http.post(f"{root}/tokenize", json={"messages": MESSAGES}).json()
        assert chat["count"] == RENDERED
        assert tiny.http.post(f"{root}/detokenize", json={"tokens": TOKENS}).json() == {"prompt": "ab"}

    def test_those_of_vllm_answer_as_its_do(self, tiny: Server) -> None:
        tiny.until_idle()
        assert tiny.http.get("/version").json() == {"version": __version__}
        assert tiny.http.get("/load").json() == {"server_load": 0}
        for method in ("GET", "POST"):
            ping = tiny.http.request(method, "/ping")
            assert (ping.status_code, ping.content) == (200, b"")
        info = tiny.http.get("/server_info").json()
        assert (info["version"], info["model"]) == (__version__, "tiny")
        assert not {"auth", "server", "rate_limiting"} & info["config"].keys()

    @pytest.mark.parametrize(
        ("path", "ask"),
        [
            ("/v1/moderations", lambda c: c.moderations.create(input="a")),
            ("/v1/images/generations", lambda c: c.images.generate(prompt="a")),
            ("/v1/files", lambda c: c.files.list()),
        ],
    )
    def test_those_that_are_not_there_are_named(self, client: OpenAI, path: str, ask: Callable[[Any], object]) -> None:
        with pytest.raises(openai.NotFoundError, match=path) as caught:
            ask(client)
        assert caught.value.code == "not_found"


def texts(response: Completion | ChatCompletion) -> list[str | None]:
    return [choice.message.content if hasattr(choice, "message") else choice.text for choice in response.choices]


X = {"120": 100}  # a bias that all but forces an x
BOTH: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    ({"max_tokens": 1}, lambda a: a.usage.completion_tokens == 1 and a.choices[0].finish_reason == "length"),
    ({"logit_bias": X}, lambda a: texts(a) == ["xxxx"]),
    ({"logit_bias": X, "stop": "xx"}, lambda a: texts(a) == [""] and a.choices[0].finish_reason == "stop"),
    ({"logit_bias": X, "stop": ["y", "xxx"], "include_stop_str_in_output": True}, lambda a: texts(a) == ["xxx"]),
    ({"logit_bias": X, "stop_token_ids": [120]}, lambda a: texts(a) == [""]),
    ({"logit_bias": X, "stop": "x", "min_tokens": 4}, lambda a: texts(a) == ["xxxx"]),
    ({"logit_bias": X, "ignore_eos": True}, lambda a: texts(a) == ["xxxx"]),
    ({"logit_bias": X, "frequency_penalty": 2, "presence_penalty": -2.0}, lambda a: texts(a) == ["xxxx"]),
    ({"logit_bias": X, "repetition_penalty": 100.0, "temperature": 0}, lambda a: a.usage.completion_tokens == 4),
    ({"logit_bias": X, "n": 3}, lambda a: texts(a) == ["xxxx"] * 3 and [c.index for c in a.choices] == [0, 1, 2]),
    ({"logit_bias": X, "return_token_ids": True}, lambda a: a.choices[0].token_ids == [120] * 4),
    ({"logit_bias": X, "top_k": 5, "top_p": 0.5, "min_p": 0.5}, lambda a: texts(a) == ["xxxx"]),
    ({"logit_bias": X, "priority": 3}, lambda a: texts(a) == ["xxxx"]),
    ({"structured_outputs": {"choice": ["yes"]}}, lambda a: texts(a)[0] in ("yes", "yes"[:4])),
    ({"structured_outputs": {"regex": "[0-9]{4}"}}, lambda a: str(texts(a)[0]).isdecimal()),
    ({"structured_outputs": {"json": {"const": 77}}}, lambda a: texts(a) == ["77"]),
    ({"structured_outputs": {"grammar": 'start: "ab" "cd"'}}, lambda a: texts(a) == ["abcd"]),
    ({"response_format": {"type": "json_object"}}, lambda a: str(texts(a)[0]).startswith("{")),
    ({"user": "u", "safety_identifier": "s", "metadata": {"a": "b"}, "store": True}, lambda a: len(a.choices) == 1),
    ({"model": "minute"}, lambda a: a.model == "minute"),
]
COMPLETIONS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    ({"best_of": 3, "n": 2}, lambda a: len(a.choices) == 2 and a.usage.completion_tokens == 12),
    ({"echo": True, "logit_bias": X}, lambda a: texts(a) == ["axxxx"]),
    ({"logprobs": 20}, lambda a: {len(top) for top in a.choices[0].logprobs.top_logprobs} <= {20, 21}),
    ({"prompt": [TOKENS, [99]]}, lambda a: a.usage.prompt_tokens == 3 and len(a.choices) == 2),
]
CHATS: list[tuple[dict[str, Any], Callable[[Any], bool]]] = [
    ({"max_tokens": None, "max_completion_tokens": 2}, lambda a: a.usage.completion_tokens == 2),
    ({"logprobs": True}, lambda a: [len(each.top_logprobs) for each in a.choices[0].logprobs.content] == [0] * 4),
    ({"logprobs": True, "top_logprobs": 20}, lambda a: len(a.choices[0].logprobs.content[3].top_logprobs) == 20),
    ({"messages": [{"role": "developer", "content": [{"type": "text", "text": "é"}]}]}, lambda a: len(a.choices) == 1),
]


def asked_of(value: object) -> str:
    return "" if callable(value) else str(value)[:60]


class TestParameters:
    @pytest.mark.parametrize(("asked", "holds"), BOTH + COMPLETIONS, ids=asked_of)
    def test_of_completions(self, client: OpenAI, asked: dict[str, Any], holds: Callable[[Completion], bool]) -> None:
        response = client.completions.create(model="tiny", prompt="a", max_tokens=4, extra_body=asked)
        self.check_envelope(response, "text_completion")
        assert holds(response), response

    @pytest.mark.parametrize(("asked", "holds"), BOTH + CHATS, ids=asked_of)
    def test_of_chats(self, client: OpenAI, asked: dict[str, Any], holds: Callable[[ChatCompletion], bool]) -> None:
        response = client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=4, extra_body=asked)
        self.check_envelope(response, "chat.completion")
        assert holds(response), response

    @staticmethod
    def check_envelope(response: Completion | ChatCompletion, kind: str) -> None:
        """All that the client's types declare, and the table promises."""
        type(response).model_validate(response.model_dump())  # the client itself checks nothing
        assert response.object == kind
        assert response.system_fingerprint
        assert response.usage is not None
        assert response.usage.total_tokens == response.usage.prompt_tokens + response.usage.completion_tokens
        assert response.usage.prompt_tokens_details is not None
        assert response.usage.prompt_tokens_details.cached_tokens is not None

    @pytest.mark.parametrize(
        ("field", "value"),
        [
            *(("functions", [{"name": "f"}]), ("function_call", "f"), ("prediction", {"type": "content"})),
            *(("reasoning_effort", "low"), ("verbosity", "low"), ("web_search_options", {}), ("moderation", {})),
            *(("service_tier", "priority"), ("chat_template", "x"), ("suffix", "s")),
            *(("prompt_cache_options", {}), ("prompt_cache_retention", "24h"), ("modalities", ["audio"])),
        ],
    )
    def test_that_the_model_lacks_are_refused_by_name(self, client: OpenAI, field: str, value: object) -> None:
        for ask in (
            lambda **more: client.completions.create(model="tiny", prompt="a", **more),
            lambda **more: client.chat.completions.create(model="tiny", messages=MESSAGES, **more),
        ):
            with pytest.raises(openai.BadRequestError, match=field) as caught:
                ask(extra_body={field: value})
            assert (caught.value.param, caught.value.code) == (field, "unsupported_parameter")

    @pytest.mark.parametrize(
        ("choice", "param"),
        [
            ("f", "tool_choice"),
            (5, "tool_choice"),
            ({"type": "allowed_tools", "allowed_tools": {}}, "tool_choice.type"),
            ({"type": "function"}, "tool_choice.function"),
            ({"type": "function", "function": {"name": 5}}, "tool_choice.function.name"),
        ],
    )
    def test_of_tools_are_reported_by_the_variant_that_is_meant(self, tiny: Server, choice: object, param: str) -> None:
        body = {"messages": MESSAGES, "tool_choice": choice}
        assert tiny.refusal(body, "/v1/chat/completions")["param"] == param


FIRST_TOKEN = ".001 .005 .01 .02 .04 .06 .08 .1 .25 .5 .75 1 2.5 5 7.5 10 20 40 80 160"
BETWEEN_TOKENS = ".001 .0025 .005 .01 .025 .05 .075 .1 .15 .2 .3 .4 .5 .75 1 2.5 5 7.5 10"
WHOLE_REQUEST = ".1 .3 .5 .8 1 1.5 2 2.5 5 10 15 20 30 40 50 60 120 240 480 960"
GAUGES = (
    *("num_requests_running", "num_requests_waiting", "num_requests_swapped", "state_slots_usage_perc"),
    *("kv_cache_usage_perc", "cache_config_info"),
)
COUNTERS = (
    *("prefix_cache_queries", "prefix_cache_hits", "num_preemptions", "prompt_tokens", "prompt_tokens_cached"),
    *("generation_tokens", "spec_decode_num_drafts", "spec_decode_num_draft_tokens"),
    "spec_decode_num_accepted_tokens",
)
HISTOGRAMS = {
    "time_to_first_token_seconds": FIRST_TOKEN,
    "inter_token_latency_seconds": BETWEEN_TOKENS,
    "time_per_output_token_seconds": BETWEEN_TOKENS,
    "request_time_per_output_token_seconds": BETWEEN_TOKENS,
    **dict.fromkeys(
        (
            "e2e_request_latency_seconds",
            *(f"request_{part}_time_seconds" for part in ("queue", "prefill", "decode", "inference")),
        ),
        WHOLE_REQUEST,
    ),
    **dict.fromkeys(
        (
            *("request_prompt_tokens", "request_generation_tokens", "iteration_tokens_total", "request_params_n"),
            *("request_params_max_tokens", "step_duration_seconds", "batch_occupancy"),
        ),
    ),
}


NAMES = {
    "gauge": (*GAUGES, "http_requests_in_flight"),
    "counter": (*COUNTERS, "request_success", "http_requests"),
    "histogram": HISTOGRAMS,
}


class TestMetrics:
    def test_are_those_of_the_list(self, tiny: Server) -> None:
        tiny.complete(prompt="a", max_tokens=2)
        families = {each.name: each for each in text_string_to_metric_families(tiny.http.get("/metrics").text)}
        kinds = {f"bdh_{name}": kind for kind, names in NAMES.items() for name in names}
        assert {name: families[name].type for name in kinds} == kinds
        for name in kinds.keys() - {"bdh_http_requests", "bdh_http_requests_in_flight"}:
            assert all(each.labels.get("model_name") == "tiny" for each in families[name].samples), name
        for name, buckets in HISTOGRAMS.items():
            bounds = [each.labels["le"] for each in families[f"bdh_{name}"].samples if each.name.endswith("_bucket")]
            assert bounds.pop() == "+Inf"
            assert buckets is None or [*map(float, bounds)] == [*map(float, buckets.split())], name
            assert sorted(map(float, bounds)) == [*map(float, bounds)]
        assert all(math.isfinite(each.value) for family in families.values() for each in family.samples)
        reasons = {each.labels["finished_reason"] for each in families["bdh_request_success"].samples}
        assert "length" in reasons
        assert reasons <= {"stop", "length", "abort", "error"}
        routes = {(each.labels["route"], each.labels["status"]) for each in families["bdh_http_requests"].samples}
        assert ("/v1/completions", "200") in routes
