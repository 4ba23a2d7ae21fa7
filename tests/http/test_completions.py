"""/v1/completions as the official client sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from openai.types import Completion

if TYPE_CHECKING:
    from tests.conftest import Server

PROMPT = "ROMEO:\n"
TOKENS = 40


def joined(events: list[dict[str, Any]], index: int = 0) -> str:
    return "".join(c["text"] for event in events for c in event["choices"] if c["index"] == index)


@pytest.fixture(scope="module")
def greedy(server: Server) -> str:
    """What the bundled model says to PROMPT when it always takes the likeliest token."""
    return server.text(prompt=PROMPT, max_tokens=TOKENS, temperature=0)


def test_a_response_is_a_typed_object_with_exact_usage(server: Server) -> None:
    with server.openai() as client:
        completion = client.completions.create(model="bdh-shakespeare", prompt=PROMPT, max_tokens=12)
    assert isinstance(completion, Completion)
    assert completion.object == "text_completion"
    assert completion.model == "bdh-shakespeare"
    assert completion.id.startswith("cmpl-")
    assert completion.system_fingerprint is not None
    assert "bdh-shakespeare" in completion.system_fingerprint
    (choice,) = completion.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert len(choice.text.encode()) == 12  # the model is one of ASCII
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(PROMPT)
    assert completion.usage.completion_tokens == 12
    assert completion.usage.total_tokens == len(PROMPT) + 12
    assert completion.usage.prompt_tokens_details is not None
    assert completion.usage.prompt_tokens_details.cached_tokens == 0


def test_a_greedy_stream_equals_the_unstreamed_response(server: Server, greedy: str) -> None:
    with server.openai() as client:
        stream = client.completions.create(
            model="bdh-shakespeare", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
        )
        chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks).encode() == greedy.encode()
    assert all(isinstance(chunk, Completion) and chunk.object == "text_completion" for chunk in chunks)
    assert len({(chunk.id, chunk.created, chunk.model, chunk.system_fingerprint) for chunk in chunks}) == 1
    assert [str(chunk.choices[0].finish_reason) for chunk in chunks] == ["None"] * (len(chunks) - 1) + ["length"]
    assert len(chunks) > 1
    assert all(chunk.usage is None for chunk in chunks)


async def test_the_async_client_streams_the_same(server: Server, greedy: str) -> None:
    async with server.async_openai() as client:
        stream = await client.completions.create(
            model="bdh-shakespeare", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stream=True
        )
        assert "".join([chunk.choices[0].text async for chunk in stream]) == greedy


def test_the_model_may_be_left_out_and_null_means_the_default(server: Server, greedy: str) -> None:
    nulls = dict.fromkeys(
        ("model", "top_p", "top_k", "seed", "n", "stop", "stream", "stream_options", "return_token_ids", "user")
    )
    body = nulls | {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "logprobs": None, "tools": None}
    response = server.complete(**body)
    assert response["model"] == "bdh-shakespeare"
    assert response["choices"][0]["text"] == greedy


def test_labels_are_accepted(server: Server, greedy: str) -> None:
    labels = {"user": "someone", "metadata": {"purpose": "test"}, "store": True}
    assert server.text(prompt=PROMPT, max_tokens=TOKENS, temperature=0, **labels) == greedy


def test_an_alias_names_the_model_and_is_echoed(tiny: Server) -> None:
    assert tiny.complete(model="minute", prompt="a", max_tokens=1)["model"] == "minute"


class TestUsage:
    def test_a_stream_ends_with_it_when_asked(self, server: Server) -> None:
        with server.openai() as client:
            *chunks, last = client.completions.create(
                model="bdh-shakespeare",
                prompt="Thé",
                max_tokens=5,
                stream=True,
                stream_options={"include_usage": True},
            )
        assert last.choices == []
        assert last.usage is not None
        assert (last.usage.prompt_tokens, last.usage.completion_tokens, last.usage.total_tokens) == (4, 5, 9)
        assert all(chunk.choices and chunk.usage is None for chunk in chunks)

    def test_every_other_chunk_says_null_then_and_nothing_otherwise(self, tiny: Server) -> None:
        asked = tiny.events(prompt="a", max_tokens=3, stream_options={"include_usage": True})
        assert [event["usage"] for event in asked[:-1]] == [None] * (len(asked) - 1)
        for options in (None, {}, {"include_usage": False}, {"include_usage": None}):
            assert all("usage" not in e for e in tiny.events(prompt="a", max_tokens=3, stream_options=options))

    def test_counts_all_prompts_and_all_responses(self, tiny: Server) -> None:
        usage = tiny.complete(prompt=["abc", "d"], max_tokens=7)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (4, 14, 18)

    def test_counts_a_prompt_once_however_many_responses_it_has(self, tiny: Server) -> None:
        usage = tiny.complete(prompt="abc", max_tokens=7, n=3)["usage"]
        assert (usage["prompt_tokens"], usage["completion_tokens"], usage["total_tokens"]) == (3, 21, 24)

    def test_counts_the_tokens_of_a_stop_string(self, server: Server, greedy: str) -> None:
        stop = greedy[10:14]
        response = server.complete(prompt=PROMPT, max_tokens=TOKENS, temperature=0, stop=stop)
        assert response["usage"]["completion_tokens"] == greedy.index(stop) + len(stop)


class TestPrompts:
    def test_each_of_a_list_gets_its_own_response_in_order(self, tiny: Server) -> None:
        prompts = ["abc", "d", "a longer one, of another length"]
        with tiny.openai() as client:
            together = client.completions.create(model="tiny", prompt=prompts, max_tokens=16, temperature=0)
        assert [choice.index for choice in together.choices] == [0, 1, 2]
        alone = [tiny.text(prompt=prompt, max_tokens=16, temperature=0) for prompt in prompts]
        assert [choice.text for choice in together.choices] == alone
        assert len(set(alone)) == 3

    def test_token_ids_mean_what_their_text_means(self, tiny: Server) -> None:
        same = {"max_tokens": 8, "seed": 3}
        of_text = tiny.text(prompt="né", **same)
        assert tiny.text(prompt=list("né".encode()), **same) == of_text
        lists = tiny.complete(prompt=[list("né".encode()), list(b"b")], **same)
        assert [choice["text"] for choice in lists["choices"]] == [of_text, tiny.text(prompt="b", **same)]

    def test_token_ids_may_be_invalid_utf8(self, tiny: Server) -> None:
        assert tiny.complete(prompt=[255, 0, 128], max_tokens=2)["usage"]["prompt_tokens"] == 3

    def test_one_longer_than_a_prefill_chunk_is_all_read(self, tiny: Server) -> None:
        prompt = "".join(chr(97 + i * i % 26) for i in range(1500))
        response = tiny.complete(prompt=prompt, max_tokens=8, temperature=0)
        assert response["usage"]["prompt_tokens"] == 1500
        other_start = tiny.text(prompt="Z" + prompt[1:], max_tokens=8, temperature=0)
        assert tiny.text(prompt=prompt, max_tokens=8, temperature=0) == response["choices"][0]["text"]
        assert isinstance(other_start, str)


class TestResponses:
    def test_n_gives_different_ones_of_which_the_first_is_that_of_one(self, tiny: Server) -> None:
        with tiny.openai() as client:
            several = client.completions.create(model="tiny", prompt="a", max_tokens=16, n=4, seed=11)
        texts = [choice.text for choice in several.choices]
        assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
        assert len(set(texts)) == 4
        assert texts[0] == tiny.text(prompt="a", max_tokens=16, seed=11)

    def test_equal_prompts_have_responses_of_their_own_unless_there_is_a_seed(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["a"] * 4, "max_tokens": 16}
        unseeded, seeded = tiny.complete(**body)["choices"], tiny.complete(**body, seed=3)["choices"]
        assert len({choice["text"] for choice in unseeded}) == 4
        assert len({choice["text"] for choice in seeded}) == 1

    def test_n_of_several_prompts_are_next_to_each_other(self, tiny: Server) -> None:
        response = tiny.complete(prompt=["a", "b"], max_tokens=12, n=2, seed=11)
        assert [choice["index"] for choice in response["choices"]] == [0, 1, 2, 3]
        of_a, of_b = (tiny.complete(prompt=prompt, max_tokens=12, n=2, seed=11)["choices"] for prompt in "ab")
        assert [c["text"] for c in response["choices"]] == [c["text"] for c in (*of_a, *of_b)]

    def test_streams_of_n_tell_them_apart_by_index(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["a", "b"], "max_tokens": 20, "n": 2, "seed": 5}
        events = tiny.events(**body)
        whole = tiny.complete(**body)["choices"]
        assert [joined(events, index) for index in range(4)] == [choice["text"] for choice in whole]
        ends = [c["index"] for event in events for c in event["choices"] if c["finish_reason"] is not None]
        assert sorted(ends) == [0, 1, 2, 3]

    def test_max_tokens_bounds_them_exactly(self, tiny: Server) -> None:
        for most in (1, 2, 33):
            response = tiny.complete(prompt="a", max_tokens=most, return_token_ids=True)
            assert len(response["choices"][0]["token_ids"]) == response["usage"]["completion_tokens"] == most


class TestSeed:
    def test_gives_the_same_text_twice_streamed_or_not(self, server: Server) -> None:
        body: dict[str, Any] = {
            "prompt": PROMPT,
            "max_tokens": 30,
            "seed": 42,
            "temperature": 1.2,
            "top_p": 0.95,
            "top_k": 50,
        }
        first = server.text(**body)
        assert server.text(**body) == first
        assert joined(server.events(**body)) == first

    def test_another_or_none_gives_another_text(self, tiny: Server) -> None:
        texts = {tiny.text(prompt="a", max_tokens=24, seed=seed) for seed in (0, 1, -1, 2**63, 2**64 - 2)}
        texts |= {tiny.text(prompt="a", max_tokens=24) for _ in range(2)}
        assert len(texts) == 7

    def test_does_not_matter_to_the_greedy(self, tiny: Server) -> None:
        texts = {tiny.text(prompt="a", max_tokens=24, temperature=0, seed=seed) for seed in range(3)}
        assert len(texts) == 1

    def test_does_not_depend_on_who_shares_the_batch(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": "alone", "max_tokens": 32, "seed": 9}
        alone = tiny.text(**body)
        crowd = tiny.complete(prompt=["x" * n for n in range(1, 20)] + ["alone"], max_tokens=32, seed=9)
        assert crowd["choices"][-1]["text"] == alone


class TestSampling:
    def test_top_k_of_one_is_greedy(self, tiny: Server) -> None:
        greedy = tiny.text(prompt="a", max_tokens=16, temperature=0)
        assert tiny.text(prompt="a", max_tokens=16, temperature=2, top_k=1) == greedy
        assert tiny.text(prompt="a", max_tokens=16, temperature=2, top_p=1e-9) == greedy

    def test_top_k_of_zero_or_minus_one_is_off(self, tiny: Server) -> None:
        texts = {tiny.text(prompt="a", max_tokens=16, seed=4, **top_k) for top_k in ({}, {"top_k": 0}, {"top_k": -1})}
        assert len(texts) == 1

    @pytest.mark.parametrize("temperature", [1e-9, 1e-30, 1e-40, 5e-324])
    def test_a_temperature_close_to_zero_is_greedy(self, tiny: Server, temperature: float) -> None:
        greedy = tiny.text(prompt="a", max_tokens=16, temperature=0)
        assert tiny.text(prompt="a", max_tokens=16, temperature=temperature) == greedy

    def test_a_top_k_beyond_the_vocabulary_is_off(self, tiny: Server) -> None:
        for top_k in (257, 2**31, 2**63 - 1):
            assert tiny.text(prompt="a", max_tokens=8, seed=4, top_k=top_k) == tiny.text(
                prompt="a", max_tokens=8, seed=4
            )


class TestStop:
    def body(self, stop: str | list[str]) -> dict[str, Any]:
        return {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stop": stop}

    @pytest.mark.parametrize(("begin", "length"), [(0, 1), (12, 1), (12, 2), (9, 7), (TOKENS - 3, 3)])
    def test_cuts_before_it(self, server: Server, greedy: str, begin: int, length: int) -> None:
        stop = greedy[begin : begin + length]
        expected = greedy[: greedy.index(stop)]
        with server.openai() as client:
            completion = client.completions.create(
                model="bdh-shakespeare", prompt=PROMPT, max_tokens=TOKENS, temperature=0, stop=stop
            )
        assert (completion.choices[0].text, completion.choices[0].finish_reason) == (expected, "stop")

    @pytest.mark.parametrize(("begin", "length"), [(0, 1), (12, 2), (9, 7)])
    def test_no_part_of_it_is_streamed(self, server: Server, greedy: str, begin: int, length: int) -> None:
        stop = greedy[begin : begin + length]
        events = server.events(**self.body(stop))
        assert joined(events) == greedy[: greedy.index(stop)]
        assert [e["choices"][0]["finish_reason"] for e in events][-1] == "stop"

    def test_one_that_only_begins_holds_nothing_back_in_the_end(self, server: Server, greedy: str) -> None:
        stops = [greedy[begin : begin + 4] + "\0" for begin in (3, 10, TOKENS - 4)]
        events = server.events(**self.body(stops))
        assert joined(events) == greedy == server.text(**self.body(stops))
        assert events[-1]["choices"][0]["finish_reason"] == "length"

    def test_the_first_to_come_wins(self, server: Server, greedy: str) -> None:
        stops = [greedy[20:24], greedy[8:11], "never\0", greedy[14:16]]
        expected = greedy[: min(greedy.index(stop) for stop in stops if stop in greedy)]
        assert server.text(**self.body(stops)) == expected == joined(server.events(**self.body(stops)))

    def test_the_longer_of_two_that_begin_alike_does_not_hide_the_shorter(self, server: Server, greedy: str) -> None:
        assert server.text(**self.body([greedy[6:12], greedy[6:8]])) == greedy[: greedy.index(greedy[6:8])]

    def test_may_be_a_character_of_several_bytes(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": "a", "max_tokens": 300, "seed": 1}
        text = tiny.text(**body)
        stop = next(character for character in text if ord(character) > 127 and character != "\ufffd")
        response = tiny.complete(**body, stop=stop)["choices"][0]
        assert (response["text"], response["finish_reason"]) == (text[: text.index(stop)], "stop")
        assert joined(tiny.events(**body, stop=stop)) == response["text"]

    def test_ends_one_of_several_responses_and_not_the_others(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["a", "b"], "max_tokens": 60, "seed": 1}
        one, other = (choice["text"] for choice in tiny.complete(**body)["choices"])
        stop = next(one[at : at + 3] for at in range(3, 50) if one[at : at + 3] not in other)
        cut = tiny.complete(**body, stop=[stop])["choices"]
        assert [(c["text"], c["finish_reason"]) for c in cut] == [(one[: one.index(stop)], "stop"), (other, "length")]


class TestCharacters:
    """`tiny` answers with random bytes: some are characters of several bytes, many are invalid."""

    BODY: ClassVar[dict[str, Any]] = {"prompt": "Ünïcödé → 漢字 🎭", "max_tokens": 400, "temperature": 2, "seed": 7}

    def test_are_never_cut_by_a_stream(self, tiny: Server) -> None:
        events = tiny.events(**self.BODY, return_token_ids=True)
        text = joined(events)
        assert text == tiny.text(**self.BODY)
        tokens = [token for event in events for token in event["choices"][0]["token_ids"]]
        assert text == bytes(tokens).decode(errors="replace")
        assert any(ord(character) > 127 and character != "\ufffd" for character in text)

    def test_are_the_same_whoever_decodes_the_stream(self, tiny: Server) -> None:
        with tiny.openai() as client:
            stream = client.completions.create(
                model="tiny", prompt="Ünïcödé → 漢字 🎭", max_tokens=400, temperature=2, seed=7, stream=True
            )
            assert "".join(chunk.choices[0].text for chunk in stream) == tiny.text(**self.BODY)

    def test_unfinished_at_the_end_become_replacement_characters(self, tiny: Server) -> None:
        tokens = tiny.complete(**self.BODY, return_token_ids=True)["choices"][0]["token_ids"]
        begin = next(at for at, token in enumerate(tokens) if token >= 0xC2 and token < 0xF5)
        body = self.BODY | {"max_tokens": begin + 1}
        assert tiny.text(**body).endswith("\ufffd")
        assert joined(tiny.events(**body)) == tiny.text(**body)


class TestTokenIds:
    def test_come_whole_with_a_response(self, server: Server) -> None:
        choice = server.complete(prompt=PROMPT, max_tokens=9, return_token_ids=True)["choices"][0]
        assert choice["prompt_token_ids"] == list(PROMPT.encode())
        assert bytes(choice["token_ids"]).decode() == choice["text"]
        assert len(choice["token_ids"]) == 9

    def test_come_with_each_chunk_and_the_prompts_once(self, tiny: Server) -> None:
        body: dict[str, Any] = {"prompt": ["ab", "c"], "max_tokens": 10, "seed": 2, "return_token_ids": True}
        events = tiny.events(**body)
        whole = tiny.complete(**body)["choices"]
        for index, prompt in enumerate([[97, 98], [99]]):
            mine = [c for event in events for c in event["choices"] if c["index"] == index]
            assert [c["prompt_token_ids"] for c in mine if "prompt_token_ids" in c] == [prompt]
            assert "prompt_token_ids" in mine[0]
            assert [token for c in mine for token in c["token_ids"]] == whole[index]["token_ids"]

    def test_do_not_come_unasked(self, tiny: Server) -> None:
        choice = tiny.complete(prompt="a", max_tokens=2)["choices"][0]
        assert [choice["token_ids"], choice["prompt_token_ids"]] == [None, None]  # as vLLM has it
        assert all("token_ids" not in e["choices"][0] for e in tiny.events(prompt="a", max_tokens=2))


class TestModelWithoutTokenizer:
    def test_returns_token_ids_for_token_ids(self, odd: Server) -> None:
        body: dict[str, Any] = {"prompt": [1, 96, 0], "max_tokens": 40, "seed": 6, "return_token_ids": True}
        response = odd.complete(**body)
        (choice,) = response["choices"]
        assert choice["prompt_token_ids"] == [1, 96, 0]
        assert choice["text"] == ""
        assert len(choice["token_ids"]) == 40
        assert all(0 <= token < 97 for token in choice["token_ids"])
        assert len(set(choice["token_ids"])) > 4
        assert (response["usage"]["prompt_tokens"], response["usage"]["completion_tokens"]) == (3, 40)
        events = odd.events(**body)
        assert [token for e in events for token in e["choices"][0]["token_ids"]] == choice["token_ids"]

    def test_refuses_text_by_name(self, odd: Server) -> None:
        error = odd.refusal({"prompt": "text", "max_tokens": 1})
        assert error["param"] == "prompt"
        assert "token" in error["message"]
        chat = {"messages": [{"role": "user", "content": "text"}], "max_tokens": 1}
        assert odd.refusal(chat, "/v1/chat/completions")["param"] == "messages"

    @pytest.mark.parametrize("token", [97, 255, -1, 2**63, 2**64 - 1])
    def test_refuses_ids_beyond_its_vocabulary(self, odd: Server, token: int) -> None:
        error = odd.refusal({"prompt": [1, token], "max_tokens": 1})
        assert error["param"] == "prompt"
        assert "96" in error["message"]
