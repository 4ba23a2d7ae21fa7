"""The Python API returns what a server returns for the same bodies."""

from __future__ import annotations

import math
import random
from typing import TYPE_CHECKING, Any

import pytest

from bdh_batch import LLM, SamplingParams, StructuredOutputsParams

if TYPE_CHECKING:
    from tests.conftest import Server

AT_ONCE = 100  # prompts of a request over HTTP


def test_a_thousand_prompts_get_the_same_completions(llm: LLM, tiny: Server) -> None:
    chosen = random.Random(1)
    prompts = ["".join(chosen.choices("abc \n€", k=chosen.randint(1, 30))) for _ in range(1000)]
    params = SamplingParams(max_tokens=4, seed=7, temperature=0.9, top_p=0.95)
    mine = llm.generate(prompts, params, use_tqdm=False)
    assert [each.prompt for each in mine] == prompts
    theirs: list[dict[str, Any]] = []
    for begin in range(0, len(prompts), AT_ONCE):
        body = {"max_tokens": 4, "seed": 7, "temperature": 0.9, "top_p": 0.95, "return_token_ids": True}
        theirs += tiny.complete(prompt=prompts[begin : begin + AT_ONCE], **body)["choices"]
    for one, other in zip(mine, theirs, strict=True):
        [output] = one.outputs
        assert one.prompt_token_ids == other["prompt_token_ids"]
        assert (output.text, output.token_ids) == (other["text"], other["token_ids"])
        assert (output.finish_reason, output.stop_reason) == (other["finish_reason"], None)


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 3},
        {"temperature": 0.0, "repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": -0.5},
        {"top_k": 5, "min_p": 0.1, "min_tokens": 3},
        {"stop": ["e", "t"], "include_stop_str_in_output": True, "max_tokens": 60},
        {"allowed_token_ids": [97, 98, 99], "bad_words": ["ab"], "ignore_eos": True},
        {"truncate_prompt_tokens": 3, "skip_special_tokens": False, "cache_salt": "one"},
    ],
)
def test_sampling_parameters_are_the_fields_of_a_body(llm: LLM, tiny: Server, fields: dict[str, Any]) -> None:
    fields = {"max_tokens": 8, "seed": 3} | fields
    [mine] = llm.generate("To be, or not", SamplingParams(**fields))
    theirs = tiny.complete(prompt="To be, or not", return_token_ids=True, **fields)["choices"]
    shown = [(each.text, each.token_ids, each.finish_reason) for each in mine.outputs]
    assert shown == [(each["text"], each["token_ids"], each["finish_reason"]) for each in theirs]


def test_biases_and_structured_outputs_too(llm: LLM, tiny: Server) -> None:
    [mine] = llm.generate("x", SamplingParams(logit_bias={65: 100}, max_tokens=3, temperature=0))
    assert mine.outputs[0].text == tiny.text(prompt="x", logit_bias={"65": 100}, max_tokens=3, temperature=0) == "AAA"
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    given: Any
    for given in (StructuredOutputsParams(json=schema), {"json": schema}):
        [mine] = llm.generate("x", SamplingParams(structured_outputs=given, max_tokens=99, seed=5))
        body = {"structured_outputs": {"json": schema}, "max_tokens": 99, "seed": 5}
        assert mine.outputs[0].text == tiny.text(prompt="x", **body)
    [mine] = llm.generate("x", SamplingParams(structured_outputs={"json_object": True}, max_tokens=9, seed=5))
    assert mine.outputs[0].text == tiny.text(prompt="x", response_format={"type": "json_object"}, max_tokens=9, seed=5)


def test_logprobs(llm: LLM, tiny: Server) -> None:
    [mine] = llm.generate("Hello", SamplingParams(max_tokens=5, seed=2, logprobs=2, prompt_logprobs=1))
    body = {"prompt": "Hello", "max_tokens": 5, "seed": 2}
    theirs = tiny.complete(**body, logprobs=2, prompt_logprobs=1, return_tokens_as_token_ids=True)["choices"][0]
    [output] = mine.outputs
    assert output.logprobs is not None
    assert [logprobs[token].logprob for token, logprobs in zip(output.token_ids, output.logprobs)] == pytest.approx(
        theirs["logprobs"]["token_logprobs"], abs=1e-6
    )
    assert output.cumulative_logprob == pytest.approx(sum(theirs["logprobs"]["token_logprobs"]))
    tops = [{f"token_id:{token}" for token in entry} for entry in output.logprobs]
    assert tops == [set(entry) for entry in theirs["logprobs"]["top_logprobs"]]
    assert mine.prompt_logprobs is not None
    assert mine.prompt_logprobs[0] is None
    for one, other in zip(mine.prompt_logprobs[1:], theirs["prompt_logprobs"][1:], strict=True):
        assert one is not None
        assert [*map(str, one)] == [*other]
        assert [[each.rank, each.decoded_token] for each in one.values()] == [
            [each["rank"], each["decoded_token"]] for each in other.values()
        ]


def test_chats(llm: LLM, tiny: Server) -> None:
    conversations = [
        [{"role": "user", "content": "Who?"}],
        [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"}],
    ]
    mine = llm.chat(conversations, SamplingParams(max_tokens=6, seed=1, logprobs=1), use_tqdm=False)
    for one, messages in zip(mine, conversations, strict=True):
        body = {"messages": messages, "max_tokens": 6, "seed": 1, "logprobs": True, "top_logprobs": 1}
        theirs = tiny.http.post("/v1/chat/completions", json=body).json()["choices"][0]
        assert one.outputs[0].text == theirs["message"]["content"]
        assert one.prompt is not None
        assert one.prompt.encode() == bytes(one.prompt_token_ids)
        assert one.prompt.endswith("assistant:")
    [one] = llm.chat(conversations[0], SamplingParams(max_tokens=6, seed=1))
    assert one.outputs[0].text == mine[0].outputs[0].text


def test_embeddings(llm: LLM, tiny: Server) -> None:
    texts: list[Any] = ["O Romeo", "O Juliet", [1, 2, 3]]
    mine = [each.outputs.embedding for each in llm.embed(texts, dimensions=5, use_tqdm=False)]
    data = tiny.http.post("/v1/embeddings", json={"input": texts, "dimensions": 5}).json()["data"]
    assert mine == [each["embedding"] for each in data]
    assert llm.embed("O Romeo")[0].outputs.hidden_size == 32


def test_scores_are_the_logprobs_of_an_echo(llm: LLM, tiny: Server) -> None:
    [mine] = llm.score("To be", " or")
    echo = tiny.complete(prompt="To be or", max_tokens=0, echo=True, logprobs=1)["choices"][0]["logprobs"]
    assert mine.outputs.logprobs == pytest.approx(echo["token_logprobs"][-3:], abs=1e-6)
    assert mine.outputs.score == pytest.approx(math.fsum(echo["token_logprobs"][-3:]), abs=1e-5)
    assert (bytes(mine.outputs.token_ids), bytes(mine.prompt_token_ids)) == (b" or", b"To be")


def test_scores_of_lists_pairs_and_whole_texts(llm: LLM) -> None:
    scores = [each.outputs.score for each in llm.score("To be", [" or", " not"], use_tqdm=False)]
    pairs = llm.score([("To be", " or"), ([*b"To be"], [*b" not"])], use_tqdm=False)
    assert [each.outputs.score for each in pairs] == scores
    assert [each.outputs.score for each in llm.score(["To be"] * 2, [" or", " not"], use_tqdm=False)] == scores
    several = llm.score(["To be", "Not to be"], " or", use_tqdm=False)
    assert several[0].outputs.score == scores[0] != several[1].outputs.score
    [whole], [after] = llm.score("To be"), llm.score("\n", "To be")  # texts of this tokenizer begin a line
    assert whole.outputs == after.outputs
    greedy = llm.generate("To be", SamplingParams(max_tokens=4, temperature=0))[0].outputs[0].token_ids
    assert llm.score("To be", greedy)[0].outputs.is_greedy
    assert not llm.score("To be", [*greedy[:-1], (greedy[-1] + 1) % 256])[0].outputs.is_greedy


def test_neurons_are_those_over_http(llm: LLM, tiny: Server) -> None:
    prompts = ["To be", "é!"]
    given: list[Any] = [*prompts, [97, 255]]
    mine = llm.neurons(given, top=3, use_tqdm=False)
    body = {"max_tokens": 0, "echo": True, "neurons": {"top": 3}}
    theirs = [*tiny.complete(prompt=prompts, **body)["choices"], *tiny.complete(prompt=[97, 255], **body)["choices"]]
    for one, other in zip(mine, theirs, strict=True):
        assert [each.token_id for each in one.outputs] == one.prompt_token_ids
        for token, shown in zip(one.outputs, other["neurons"], strict=True):
            layers = [(layer.active, [each._asdict() for each in layer.strongest]) for layer in token.layers]
            assert layers == [(layer["active"], layer["strongest"]) for layer in shown["layers"]]
    assert [each.prompt for each in mine] == [*prompts, None]
    assert [each.decoded_token for each in mine[2].outputs] == ["a", "bytes:\\xff"]
