"""The sampling parameters of requests, and what responses report, as clients of OpenAI and vLLM use them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionMessageParam

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Segment

if TYPE_CHECKING:
    from tests.conftest import Server

CHAT = "/v1/chat/completions"
TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
MESSAGES: list[ChatCompletionMessageParam] = [{"role": "user", "content": "Sing, é!"}]
RENDERED = "user: Sing, é!\nassistant:"
WEATHER = {
    "temperature": 1.2,
    "seed": 3,
    "presence_penalty": 0.5,
    "min_p": 0.01,
}  # a response that is not the likeliest


class Reference:
    """The model of `tiny`, computed from the start for every question."""

    def __init__(self) -> None:
        model = load_model(TINY, torch.float32, torch.device("cpu"))
        self._runner = Runner(TorchKernels(model.weights), StatePool(model.config, 1, torch.device("cpu")))

    def logits(self, tokens: Sequence[int]) -> np.ndarray:
        """[T, V]: of what follows each token."""
        return np.asarray(self._runner.logits([Segment(0, 0, tokens, None)]).double().numpy())

    def logprobs(self, tokens: Sequence[int]) -> np.ndarray:
        logits = self.logits(tokens)
        return np.asarray(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True))

    def greedy(
        self,
        prompt: Sequence[int],
        length: int,
        presence: float = 0,
        frequency: float = 0,
        repetition: float = 1,
        bias: dict[int, float] | None = None,
        banned: Sequence[int] = (),
    ) -> list[int]:
        """The likeliest tokens with penalties, by their definition."""
        response: list[int] = []
        for _ in range(length):
            values = self.logits([*prompt, *response])[-1]
            for token, amount in (bias or {}).items():
                values[token] += amount
            for token in {*prompt, *response}:
                values[token] *= repetition if values[token] <= 0 else 1 / repetition
            for token, count in Counter(response).items():
                values[token] -= presence + frequency * count
            values[list(banned)] = -np.inf
            response.append(int(values.argmax()))
        return response


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference()


def name(token: int) -> str:
    return chr(token) if token < 128 else f"bytes:\\x{token:02x}"


def joined(events: Sequence[dict[str, Any]], column: str) -> list[Any]:
    """One column of the log-probabilities of a stream."""
    return [v for e in events for c in e["choices"] if c["logprobs"] for v in c["logprobs"][column]]


class TestPenalties:
    @pytest.mark.parametrize(
        "sampling",
        [
            {"frequency": 1.1},
            {"presence": -2.0},
            {"repetition": 1.7},
            {"repetition": 0.6, "presence": 1.5, "frequency": 0.2, "bias": {101: 3.0, 10: -100.0}},
        ],
        ids=str,
    )
    def test_are_those_of_their_definition_alone_and_among_others(
        self, tiny: Server, reference: Reference, sampling: dict[str, Any]
    ) -> None:
        names = {"frequency": "frequency_penalty", "presence": "presence_penalty", "repetition": "repetition_penalty"}
        body: dict[str, Any] = {names[key]: value for key, value in sampling.items() if key in names}
        body |= {"temperature": 0, "max_tokens": 24, "return_token_ids": True}
        if "bias" in sampling:
            body["logit_bias"] = {str(token): amount for token, amount in sampling["bias"].items()}
        prompts = ["Sing, Muse", "e", "another prompt that is longer than those"]
        responses = tiny.complete(prompt=prompts, **body)["choices"]
        for prompt, response in zip(prompts, responses):
            expected = reference.greedy(prompt.encode(), 24, **sampling)
            assert response["token_ids"] == expected
        chat = tiny.http.post(CHAT, json=body | {"messages": MESSAGES}).json()["choices"][0]
        assert chat["token_ids"] == reference.greedy(RENDERED.encode(), 24, **sampling)

    def test_of_no_weight_change_nothing(self, tiny: Server) -> None:
        nothing: dict[str, Any] = {"presence_penalty": 0, "frequency_penalty": 0.0, "repetition_penalty": 1, "min_p": 0}
        plain = {"prompt": "a", "max_tokens": 20, "seed": 4}
        assert tiny.text(**plain, **nothing, logit_bias={}, min_tokens=0) == tiny.text(**plain)

    def test_min_p_of_one_is_greedy(self, tiny: Server) -> None:
        greedy = tiny.text(prompt="a", max_tokens=16, temperature=0)
        assert tiny.text(prompt="a", max_tokens=16, temperature=2, min_p=1) == greedy

    def test_a_bias_of_100_all_but_forces_a_token(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 8, "logit_bias": {"120": 100}}
        assert tiny.text(**body) == "x" * 8
        assert "".join(e["choices"][0]["text"] for e in tiny.events(**body)) == "x" * 8


class TestStopping:
    BODY: dict[str, Any] = {"prompt": "Sing", "max_tokens": 60, **WEATHER, "return_token_ids": True}  # noqa: RUF012

    @pytest.mark.parametrize("stream", [False, True])
    def test_at_a_token_shows_it_only_when_asked(self, tiny: Server, stream: bool) -> None:
        tokens = tiny.complete(**self.BODY)["choices"][0]["token_ids"]
        stop = next(token for token in tokens[9:] if token < 128)
        end = tokens.index(stop)
        for shown in (False, True):
            body = self.BODY | {"stop_token_ids": [stop, 1], "include_stop_str_in_output": shown}
            if stream:
                events = [event["choices"][0] for event in tiny.events(**body)]
                choice = {"text": "".join(e["text"] for e in events), "finish_reason": events[-1]["finish_reason"]}
                choice["token_ids"] = [token for e in events for token in e["token_ids"]]
            else:
                response = tiny.complete(**body)
                choice = response["choices"][0]
                assert response["usage"]["completion_tokens"] == end + 1
            assert choice["finish_reason"] == "stop"
            assert choice["token_ids"] == tokens[: end + 1]
            assert choice["text"] == bytes(tokens[: end + shown]).decode(errors="replace")

    def test_a_stop_string_is_shown_when_asked(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 9, "logit_bias": {"120": 100}, "stop": ["xxx", "y"]}
        for shown, text in ((False, ""), (True, "xxx")):
            choice = tiny.complete(**body, include_stop_str_in_output=shown)["choices"][0]
            assert (choice["text"], choice["finish_reason"]) == (text, "stop")
            events = tiny.events(**body, include_stop_str_in_output=shown)
            assert "".join(e["choices"][0]["text"] for e in events) == text

    def test_comes_not_before_min_tokens(self, tiny: Server, reference: Reference) -> None:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 9, "temperature": 0, "logit_bias": {"120": 100}}
        response = tiny.complete(**body, stop_token_ids=[120], min_tokens=5, return_token_ids=True)["choices"][0]
        assert response["finish_reason"] == "stop"
        assert response["token_ids"] == [*reference.greedy(b"a", 5, banned=[120]), 120]
        assert tiny.text(**body, stop="xx", min_tokens=5) == "xxxx"
        assert tiny.text(**body, stop="x", min_tokens=9) == "x" * 9

    def test_ignore_eos_leaves_a_model_without_one_as_it_is(self, tiny: Server) -> None:
        assert tiny.text(**self.BODY, ignore_eos=True) == tiny.text(**self.BODY)


class TestLogprobs:
    @pytest.mark.parametrize("stream", [False, True])
    def test_of_completions_are_columns(self, tiny: Server, reference: Reference, stream: bool) -> None:
        body: dict[str, Any] = {"prompt": "Sing", "max_tokens": 40, **WEATHER, "logprobs": 3, "return_token_ids": True}
        whole = tiny.complete(**body)["choices"][0]
        reported, tokens, text = whole["logprobs"], whole["token_ids"], whole["text"]
        if stream:
            events = tiny.events(**body)
            reported = {column: joined(events, column) for column in reported}
            shown = 0  # no token is reported before its text, and none after
            for event in events[1:]:
                choice = event["choices"][0]
                before, shown = shown, shown + len(choice["text"])
                assert all(before <= at < shown for at in (choice["logprobs"] or {"text_offset": []})["text_offset"])
        assert reported == whole["logprobs"]
        expected = reference.logprobs([*b"Sing", *tokens])[3:-1]
        assert reported["tokens"] == [name(token) for token in tokens]
        np.testing.assert_allclose(reported["token_logprobs"], expected[np.arange(40), tokens], atol=1e-4)
        for row, token, top, at in zip(expected, tokens, reported["top_logprobs"], reported["text_offset"]):
            likeliest = np.argsort(-row)[:3]
            assert set(top) == {name(each) for each in (*likeliest, token)}
            np.testing.assert_allclose([top[name(each)] for each in likeliest], row[likeliest], atol=1e-4)
            assert token >= 128 or text[at] in (chr(token), "\ufffd")  # where the character before is cut short

    @pytest.mark.parametrize("stream", [False, True])
    def test_of_chat_are_objects(self, tiny: Server, reference: Reference, stream: bool) -> None:
        body: dict[str, Any] = {"messages": MESSAGES, "max_tokens": 30, **WEATHER, "return_token_ids": True}
        body |= {"logprobs": True, "top_logprobs": 2}
        choice = tiny.http.post(CHAT, json=body).json()["choices"][0]
        reported, tokens = choice["logprobs"]["content"], choice["token_ids"]
        if stream:
            assert joined(tiny.events(CHAT, **body), "content") == reported
        expected = reference.logprobs([*RENDERED.encode(), *tokens])[len(RENDERED.encode()) - 1 : -1]
        assert [(each["token"], each["bytes"]) for each in reported] == [(name(token), [token]) for token in tokens]
        np.testing.assert_allclose([e["logprob"] for e in reported], expected[np.arange(30), tokens], atol=1e-4)
        for row, each in zip(expected, reported):
            assert [top["bytes"] for top in each["top_logprobs"]] == [[token] for token in np.argsort(-row)[:2]]

    def test_are_the_clients_typed_objects(self, tiny: Server) -> None:
        with tiny.openai() as client:
            completion = client.completions.create(
                model="tiny", prompt="a", max_tokens=3, logprobs=2, echo=True, logit_bias={"120": 100}
            )
            chat = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, top_logprobs=2, frequency_penalty=0.1
            )
            streamed = client.chat.completions.create(
                model="tiny", messages=MESSAGES, max_tokens=3, logprobs=True, stream=True, temperature=0
            )
            found = [
                t for chunk in streamed if chunk.choices[0].logprobs for t in chunk.choices[0].logprobs.content or ()
            ]
        assert isinstance(completion, Completion)
        assert isinstance(chat, ChatCompletion)
        assert completion.choices[0].text == "axxx"
        assert completion.choices[0].logprobs is not None
        assert completion.choices[0].logprobs.tokens == ["a", "x", "x", "x"]
        assert completion.choices[0].logprobs.text_offset == [0, 1, 2, 3]
        assert chat.choices[0].logprobs is not None
        assert chat.choices[0].logprobs.content is not None
        assert [len(each.top_logprobs) for each in chat.choices[0].logprobs.content] == [2, 2, 2]
        assert [each.top_logprobs for each in found] == [[], [], []]

    def test_of_none_besides_have_the_token_alone(self, tiny: Server) -> None:
        reported = tiny.complete(prompt="a", max_tokens=2, temperature=0, logprobs=0)["choices"][0]["logprobs"]
        assert [[*top.items()] for top in reported["top_logprobs"]] == [
            [(token, logprob)] for token, logprob in zip(reported["tokens"], reported["token_logprobs"])
        ]

    def test_of_what_a_stop_string_cut_off_are_not_returned(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 9, "logit_bias": {"120": 100}, "logprobs": 0}
        for stop, reported in (("xxx", []), ("xy", ["x"] * 9)):
            assert tiny.complete(**body, stop=stop)["choices"][0]["logprobs"]["tokens"] == reported
            assert joined(tiny.events(**body, stop=stop), "tokens") == reported

    def test_without_a_tokenizer_name_ids(self, odd: Server) -> None:
        body: dict[str, Any] = {"prompt": [1, 96], "max_tokens": 3, "logprobs": 1, "echo": True, "temperature": 0}
        choice = odd.complete(**body, return_token_ids=True)["choices"][0]
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in (1, 96, *choice["token_ids"])]
        assert joined(odd.events(**body), "tokens") == choice["logprobs"]["tokens"]


class TestEcho:
    TEXTS = tuple(f"{'The quick brown fox, née Füchsin. ' * (1 + n % 4)}{n}" for n in range(16))

    def check(self, reference: Reference, text: str, reported: dict[str, Any], extra: int = 0) -> None:
        """That `reported` is what the model says of `text`, and of `extra` tokens more."""
        tokens = text.encode()
        assert reported["tokens"][: len(tokens)] == [name(token) for token in tokens]
        assert reported["token_logprobs"][0] is None
        assert reported["top_logprobs"][0] is None
        assert len(reported["token_logprobs"]) == len(reported["text_offset"]) == len(tokens) + extra
        expected = reference.logprobs(tokens)
        own = expected[np.arange(len(tokens) - 1), list(tokens[1:])]
        np.testing.assert_allclose(reported["token_logprobs"][1 : len(tokens)], own, atol=1e-4)
        assert reported["text_offset"][: len(tokens)] == [
            len(tokens[:n].decode(errors="ignore")) for n in range(len(tokens))
        ]
        greedy = [
            max(top.values()) == mine for top, mine in zip(reported["top_logprobs"][1:], reported["token_logprobs"][1:])
        ]
        assert greedy[: len(tokens) - 1] == [a == b for a, b in zip(expected.argmax(axis=1), tokens[1:])]

    def test_prompt_logprobs_are_the_models_alone_and_in_a_batch(self, tiny: Server, reference: Reference) -> None:
        logprobs: dict[str, Any] = {"echo": True, "logprobs": 1, "max_tokens": 0, "temperature": 0}
        for repeat in range(2):  # a prompt that was seen before is computed again
            alone = tiny.complete(prompt=self.TEXTS[3], **logprobs)
            (choice,) = alone["choices"]
            assert (choice["text"], choice["finish_reason"]) == (self.TEXTS[3], "length")
            assert alone["usage"]["completion_tokens"] == 0, repeat
            assert alone["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
            self.check(reference, self.TEXTS[3], choice["logprobs"])
        batch = tiny.complete(prompt=list(self.TEXTS), **logprobs)["choices"]
        streamed = tiny.events(prompt=list(self.TEXTS), **logprobs)
        for index, text in enumerate(self.TEXTS):
            self.check(reference, text, batch[index]["logprobs"])
            (event,) = (c for e in streamed for c in e["choices"] if c["index"] == index)
            assert event == {name: value for name, value in batch[index].items() if name in event}
            assert event.keys() == {"index", "text", "logprobs", "finish_reason"}

    def test_comes_before_the_response(self, tiny: Server, reference: Reference) -> None:
        body: dict[str, Any] = {"prompt": ["né", "ab"], "n": 2, "max_tokens": 8, **WEATHER, "echo": True}
        for logprobs in (None, 2):
            whole = tiny.complete(**body, logprobs=logprobs)["choices"]
            events = tiny.events(**body, logprobs=logprobs)
            plain = tiny.complete(**body | {"echo": False})["choices"]
            for index, choice in enumerate(whole):
                assert choice["text"] == body["prompt"][index // 2] + plain[index]["text"]
                mine = [e for e in events if e["choices"][0]["index"] == index]
                assert "".join(e["choices"][0]["text"] for e in mine) == choice["text"]
                if logprobs is None:
                    assert choice["logprobs"] is None
                    continue
                assert {column: joined(mine, column) for column in choice["logprobs"]} == choice["logprobs"]
                self.check(reference, body["prompt"][index // 2], choice["logprobs"], extra=8)

    def test_of_a_prompt_in_many_chunks_is_whole(self, tiny: Server, reference: Reference) -> None:
        text = "".join(chr(97 + i * i % 26) for i in range(1300))
        reported = tiny.complete(prompt=text, echo=True, logprobs=1, max_tokens=1)["choices"][0]["logprobs"]
        self.check(reference, text, reported, extra=1)

    def test_of_token_ids_is_their_text(self, tiny: Server) -> None:
        choice = tiny.complete(prompt=[[255, 97], [98]], echo=True, max_tokens=0)["choices"]
        assert [each["text"] for each in choice] == ["\ufffda", "b"]


class TestBestOf:
    def test_are_the_likeliest_of_all_that_were_tried(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["ab", "c"], "max_tokens": 12, "seed": 3, "logprobs": 0}
        tried = tiny.complete(**body, n=6)["choices"]
        best = tiny.complete(**body, n=2, best_of=6)
        for prompt in range(2):
            ranked = sorted(tried[6 * prompt : 6 * prompt + 6], key=lambda c: -sum(c["logprobs"]["token_logprobs"]))
            mine = best["choices"][2 * prompt : 2 * prompt + 2]
            assert [c["text"] for c in mine] == [c["text"] for c in ranked[:2]]
            assert [c["index"] for c in mine] == [2 * prompt, 2 * prompt + 1]
        usage = best["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"]) == (3, 2 * 6 * 12)
        unasked = tiny.complete(**body | {"logprobs": None}, best_of=6)["choices"]
        assert [c["logprobs"] for c in unasked] == [None, None]
        assert [c["text"] for c in unasked] == [best["choices"][index]["text"] for index in (0, 2)]


class TestStreamOptions:
    @pytest.mark.parametrize("path", ["/v1/completions", CHAT])
    def test_usage_can_come_with_every_chunk(self, tiny: Server, path: str) -> None:
        body: dict[str, Any] = {"messages": MESSAGES} if path == CHAT else {"prompt": "abc"}
        body |= {"max_tokens": 6, "n": 2, "logit_bias": {"120": 100}}
        options: dict[str, Any]
        for options in ({"continuous_usage_stats": True}, {"continuous_usage_stats": True, "include_usage": False}):
            assert not any("usage" in event for event in tiny.events(path, **body, stream_options=options))
        for size in (None, 2):
            options = {"continuous_usage_stats": True, "include_usage": True, "chunk_tokens": size}
            events = tiny.events(path, **body, stream_options=options)
            assert events.pop()["choices"] == []
            counts = [event["usage"]["completion_tokens"] for event in events]
            assert counts == sorted(counts)
            assert counts[-1] == 12
            assert all(
                u["total_tokens"] == u["prompt_tokens"] + u["completion_tokens"] for e in events if (u := e["usage"])
            )

    def test_chunks_of_several_tokens_say_the_same(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["a", "b"], "max_tokens": 22, **WEATHER, "logprobs": 1}
        body["return_token_ids"] = True
        whole = tiny.complete(**body)["choices"]
        for size, events_each in ((1, None), (5, 6), (1000, 2)):
            events = tiny.events(**body, stream_options={"chunk_tokens": size})
            for index, choice in enumerate(whole):
                mine = [c for e in events for c in e["choices"] if c["index"] == index]
                assert "".join(c["text"] for c in mine) == choice["text"]
                assert [token for c in mine for token in c["token_ids"]] == choice["token_ids"]
                assert [n for c in mine if c["logprobs"] for n in c["logprobs"]["tokens"]] == choice["logprobs"][
                    "tokens"
                ]
                reported = [len(c["token_ids"]) for c in mine[1:]]  # the first has the prompt
                assert reported[0] == 1
                assert events_each is None or reported == [1] + [size] * (21 // size) + [21 % size]
