"""Parameters that vLLM has beside OpenAI's: what they do to responses, and what responses report by them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Segment

if TYPE_CHECKING:
    from tests.conftest import Server

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
TINY = Path(__file__).parents[1] / "data" / "conformance" / "tiny"
MESSAGES = [{"role": "user", "content": "a"}]
RENDERED = "user: a\nassistant:"
X = {"120": 100}  # a bias that all but forces an x
BOTH = pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
BODIES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": "a"}, CHAT: {"messages": MESSAGES}}


def ask(server: Server, path: str = COMPLETIONS, **body: Any) -> dict[str, Any]:
    response = server.http.post(path, json=BODIES[path] | {"max_tokens": 8, "temperature": 0} | body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def text(server: Server, path: str = COMPLETIONS, **body: Any) -> str:
    choice = ask(server, path, **body)["choices"][0]
    return str(choice["text"] if path == COMPLETIONS else choice["message"]["content"])


def logprobs_of(tokens: bytes) -> np.ndarray:
    """[T, V]: the model's own, of what follows each token."""
    model = load_model(TINY, torch.float32, torch.device("cpu"))
    runner = Runner(TorchKernels(model.weights), StatePool(model.config, 1, torch.device("cpu")))
    logits = runner.logits([Segment(0, 0, [*tokens], None)]).double()
    return np.asarray(logits.log_softmax(dim=-1).numpy())


class TestAllowedTokens:
    @BOTH
    @pytest.mark.parametrize("temperature", [0, 1.5])
    def test_are_all_that_comes(self, tiny: Server, path: str, temperature: float) -> None:
        found = text(tiny, path, allowed_token_ids=[*b"xyz"], temperature=temperature, max_tokens=60, seed=1)
        assert len(found) == 60
        assert set(found) <= set("xyz")
        assert text(tiny, path, allowed_token_ids=[120], logit_bias={"120": -100, "121": 100}) == "x" * 8

    def test_leave_log_probabilities_as_the_model_has_them(self, tiny: Server) -> None:
        one, other = (
            ask(tiny, logprobs=2, max_tokens=1, allowed_token_ids=only)["choices"][0]["logprobs"]["top_logprobs"][0]
            for only in (None, [120])
        )
        assert one.items() <= other.items()

    def test_hold_in_a_crowd_and_in_each_of_n(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["a", "bc"], "n": 3, "temperature": 1, "max_tokens": 20, "seed": 3}
        assert all(set(c["text"]) <= set("pq") for c in tiny.complete(**body, allowed_token_ids=[*b"pq"])["choices"])

    def test_go_with_a_grammar(self, tiny: Server) -> None:
        body: dict[str, Any] = {"structured_outputs": {"regex": "[a-z]{5}"}, "allowed_token_ids": [*b"bB"]}
        assert text(tiny, **body) == "bbbbb"

    @pytest.mark.parametrize(
        ("more", "param"),
        [
            ({"allowed_token_ids": []}, "allowed_token_ids"),
            ({"allowed_token_ids": [1, 256]}, "allowed_token_ids[1]"),
            ({"allowed_token_ids": ["a"]}, "allowed_token_ids[0]"),
            ({"allowed_token_ids": [1] * (2**17 + 1)}, "allowed_token_ids"),
            ({"allowed_token_ids": [120], "stop_token_ids": [120], "min_tokens": 1}, "allowed_token_ids"),
            ({"allowed_token_ids": [120], "bad_words": ["x"]}, "bad_words"),
        ],
        ids=lambda value: str(value)[:60],
    )
    def test_that_cannot_be_kept_to_are_refused(self, tiny: Server, more: dict[str, Any], param: str) -> None:
        assert tiny.refusal(BODIES[COMPLETIONS] | more)["param"] == param

    def test_that_leave_nothing_in_a_grammar_end_with_an_error(self, tiny: Server) -> None:
        body = {"prompt": "a", "structured_outputs": {"regex": "[a-z]{5}"}, "allowed_token_ids": [*b"1"]}
        assert "allowed_token_ids" in tiny.refusal(body)["message"]


class TestBadWords:
    @BOTH
    def test_never_come_and_their_parts_may(self, tiny: Server, path: str) -> None:
        assert text(tiny, path, logit_bias=X) == "x" * 8
        found = text(tiny, path, logit_bias=X, bad_words=["xxx"])
        assert "xxx" not in found
        assert found.startswith("xx")
        assert "x" not in text(tiny, path, logit_bias=X, bad_words=["x"])

    def test_are_looked_for_in_the_response_alone(self, tiny: Server) -> None:
        assert text(tiny, prompt="x", logit_bias=X, bad_words=["xx"])[0] == "x"

    def test_are_those_of_one_response(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": "a", "n": 4, "max_tokens": 60, "seed": 5, "allowed_token_ids": [*b"pqr"]}
        body["temperature"] = 2
        plain = [choice["text"] for choice in tiny.complete(**body)["choices"]]
        word = plain[0][10:12]
        found = [choice["text"] for choice in tiny.complete(**body, bad_words=[word, "zzzz"])["choices"]]
        assert not any(word in each for each in found)
        assert found[0][:11] == plain[0][:11] or word in plain[0][:11]

    def test_may_be_many(self, tiny: Server) -> None:
        words = [f"word {number}" for number in range(250)] + ["x" * 128]
        assert text(tiny, bad_words=words, logit_bias=X, max_tokens=127) == "x" * 127
        assert "x" * 128 not in text(tiny, bad_words=words, logit_bias=X, max_tokens=130)

    @pytest.mark.parametrize(
        ("words", "param"),
        [
            (["a", ""], "bad_words[1]"),
            ("a", "bad_words"),
            ([5], "bad_words[0]"),
            (["a"] * 257, "bad_words"),
            (["é" * 65], "bad_words[0]"),
        ],
        ids=lambda value: str(value)[:40],
    )
    def test_are_bounded_and_typed(self, tiny: Server, words: object, param: str) -> None:
        assert tiny.refusal({"prompt": "a", "bad_words": words})["param"] == param

    def test_without_a_tokenizer_are_refused(self, odd: Server) -> None:
        assert odd.refusal({"prompt": [1], "bad_words": ["a"]})["param"] == "bad_words"
        choice = odd.complete(prompt=[1], allowed_token_ids=[96, 5], max_tokens=9, return_token_ids=True)["choices"][0]
        assert set(choice["token_ids"]) <= {96, 5}


class TestLogprobsOfPrompts:
    def check(self, reported: list[Any], prompt: bytes, most: int) -> None:
        expected = logprobs_of(prompt)
        assert reported[0] is None
        assert len(reported) == len(prompt)
        for row, token, found in zip(expected, prompt[1:], reported[1:], strict=False):
            likeliest = [int(each) for each in np.argsort(-row)[:most]]
            assert found.keys() == {str(token), *map(str, likeliest)}
            assert next(iter(found)) == str(token)
            for name, entry in found.items():
                assert entry["logprob"] == pytest.approx(row[int(name)], abs=1e-4)
            assert [found[str(each)]["rank"] for each in likeliest] == [*range(1, most + 1)]
            assert found[str(token)]["rank"] == (row >= row[token]).sum()
            assert found[str(token)]["decoded_token"] == chr(token)

    @pytest.mark.parametrize("most", [0, 1, 5])
    def test_of_completions_are_in_each_choice(self, tiny: Server, most: int) -> None:
        prompts = ["To be, or", "not"]
        choices = ask(tiny, prompt=prompts, prompt_logprobs=most)["choices"]
        for prompt, choice in zip(prompts, choices, strict=True):
            self.check(choice["prompt_logprobs"], prompt.encode(), most)
            assert choice["logprobs"] is None

    def test_of_chats_are_beside_them(self, tiny: Server) -> None:
        response = ask(tiny, CHAT, prompt_logprobs=2, n=2, temperature=1)
        self.check(response["prompt_logprobs"], RENDERED.encode(), 2)
        assert not any("prompt_logprobs" in choice for choice in response["choices"])
        assert ask(tiny, CHAT)["prompt_logprobs"] is None

    @pytest.mark.parametrize(("few", "many"), [(1, 4), (4, 1)])
    def test_and_those_of_an_echo_have_each_as_many_as_was_asked(self, tiny: Server, few: int, many: int) -> None:
        (choice,) = ask(tiny, prompt="To be", echo=True, logprobs=few, prompt_logprobs=many)["choices"]
        self.check(choice["prompt_logprobs"], b"To be", many)
        (plain,) = ask(tiny, prompt="To be", echo=True, logprobs=few)["choices"]
        assert choice["logprobs"] == plain["logprobs"]
        (silent,) = ask(tiny, prompt="To be", echo=True, prompt_logprobs=many)["choices"]
        assert silent["logprobs"] is None

    @BOTH
    @pytest.mark.parametrize(("most", "stream"), [(1, True), (-1, False), (21, False), ("1", False)])
    def test_are_refused_where_they_cannot_be_returned(
        self, tiny: Server, path: str, most: object, stream: bool
    ) -> None:
        body = BODIES[path] | {"prompt_logprobs": most, "stream": stream}
        assert tiny.refusal(body, path)["param"] == "prompt_logprobs"

    def test_of_a_long_prompt_are_all_there(self, tiny: Server) -> None:
        prompt = "".join(chr(97 + i * i % 26) for i in range(3000))
        (choice,) = ask(tiny, prompt=prompt, max_tokens=1, prompt_logprobs=20)["choices"]
        assert len(choice["prompt_logprobs"]) == 3000
        assert {len(each) for each in choice["prompt_logprobs"][1:]} <= {20, 21}


class TestTruncation:
    @pytest.mark.parametrize(("most", "kept"), [(1, "f"), (3, "def"), (6, "abcdef"), (100, "abcdef"), (-1, "abcdef")])
    def test_keeps_the_end(self, tiny: Server, most: int, kept: str) -> None:
        prompts = ["abcdef", [*b"abcdef"]]
        for prompt in prompts:
            response = ask(tiny, prompt=prompt, truncate_prompt_tokens=most, return_token_ids=True, echo=True)
            (choice,) = response["choices"]
            assert bytes(choice["prompt_token_ids"]).decode() == kept
            assert choice["text"].startswith(kept)
            assert response["usage"]["prompt_tokens"] == len(kept)
        assert text(tiny, prompt="abcdef", truncate_prompt_tokens=most) == text(tiny, prompt=kept)

    def test_of_a_chat_is_of_its_prompt(self, tiny: Server) -> None:
        response = ask(tiny, CHAT, truncate_prompt_tokens=5, return_token_ids=True)
        assert bytes(response["prompt_token_ids"]).decode() == RENDERED[-5:]

    @BOTH
    @pytest.mark.parametrize("most", [0, -2, 131073, "5", 1.5, True])
    def test_by_what_is_no_length_is_refused(self, tiny: Server, path: str, most: object) -> None:
        error = tiny.refusal(BODIES[path] | {"truncate_prompt_tokens": most}, path)
        assert error["param"] == "truncate_prompt_tokens"


class TestNamesOfTokens:
    def test_are_their_ids_where_that_is_asked(self, tiny: Server) -> None:
        body: dict[str, Any] = {"return_tokens_as_token_ids": True, "return_token_ids": True}
        (choice,) = ask(tiny, **body, logprobs=2, echo=True, prompt_logprobs=0)["choices"]
        named = [f"token_id:{token}" for token in [97, *choice["token_ids"]]]
        assert choice["logprobs"]["tokens"] == named
        assert all(name.startswith("token_id:") for top in choice["logprobs"]["top_logprobs"][1:] for name in top)
        assert not choice["text"].startswith("token_id")
        reported = ask(tiny, CHAT, **body, logprobs=True, top_logprobs=1)["choices"][0]
        for token, each in zip(reported["token_ids"], reported["logprobs"]["content"], strict=True):
            assert (each["token"], each["bytes"]) == (f"token_id:{token}", [token])
            assert each["top_logprobs"][0]["token"] == f"token_id:{token}"

    def test_are_so_in_streams(self, tiny: Server) -> None:
        events = tiny.events(prompt="a", max_tokens=3, logprobs=0, return_tokens_as_token_ids=True)
        names = [name for e in events for c in e["choices"] if c["logprobs"] for name in c["logprobs"]["tokens"]]
        assert len(names) == 3
        assert all(name.startswith("token_id:") for name in names)


class TestEchoOfChats:
    PREFILLED = [*MESSAGES, {"role": "assistant", "content": [{"type": "text", "text": "Well, "}]}]  # noqa: RUF012
    BODY: dict[str, Any] = {"add_generation_prompt": False, "continue_final_message": True}  # noqa: RUF012

    @pytest.mark.parametrize("tools", [{}, {"tools": [{"type": "function", "function": {"name": "f"}}]}])
    def test_is_what_the_assistant_said_last(self, tiny: Server, tools: dict[str, Any]) -> None:
        body = self.BODY | tools | {"messages": self.PREFILLED, "max_tokens": 8, "temperature": 0, "n": 2}
        plain, whole = (
            [choice["message"]["content"] for choice in ask(tiny, CHAT, **body, echo=echo)["choices"]]
            for echo in (False, True)
        )
        assert whole == [f"Well, {each}" for each in plain]
        choices = [choice for event in tiny.events(CHAT, **body, echo=True) for choice in event["choices"]]
        for index in range(2):
            said = [c["delta"].get("content", "") for c in choices if c["index"] == index]
            assert "".join(said) == whole[index]

    def test_of_another_one_is_nothing(self, tiny: Server) -> None:
        assert text(tiny, CHAT, echo=True) == text(tiny, CHAT)


class TestCacheSalts:
    def test_keep_states_apart(self, tiny: Server) -> None:
        prompt = "A salted prompt that is long enough for its state to be kept: " * 3

        def cached(**salt: str) -> int:
            usage = ask(tiny, prompt=prompt, **salt)["usage"]
            return int(usage["prompt_tokens_details"]["cached_tokens"])

        assert cached(cache_salt="one") == 0
        assert cached(cache_salt="one") > 0
        assert cached(cache_salt="two") == 0
        assert cached() == 0
        assert cached() > 0
        assert cached(cache_salt="two") > 0

    @BOTH
    @pytest.mark.parametrize("salt", ["", 5, "x" * 4097])
    def test_are_labels(self, tiny: Server, path: str, salt: object) -> None:
        assert tiny.refusal(BODIES[path] | {"cache_salt": salt}, path)["param"] == "cache_salt"


@BOTH
def test_a_top_p_of_zero_takes_the_likeliest(tiny: Server, path: str) -> None:
    assert text(tiny, path, top_p=0, temperature=2, max_tokens=30) == text(tiny, path, max_tokens=30)


@BOTH
def test_labels_are_accepted(tiny: Server, path: str) -> None:
    assert text(tiny, path, request_id="r", prompt_cache_key="k") == text(tiny, path)
