"""/v1/embeddings: the mean of the model's last hidden vectors, as the specification of the kernels has them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.torch_reference import TorchKernels
from bdh_batch.messages import Segment

if TYPE_CHECKING:
    from tests.conftest import Server

PATH = "/v1/embeddings"
TINY = "tests/data/conformance/tiny"
LONG = "To be, or not to be: that is the question. é世🙂 " * 20  # several steps' worth of a prompt


@pytest.fixture(scope="module")
def runner(pytestconfig: pytest.Config) -> Runner:
    cpu = torch.device("cpu")
    model = load_model(pytestconfig.rootpath / TINY, torch.float32, cpu)
    assert model.config.trained_context is None
    assert model.config.attention_window is None
    return Runner(TorchKernels(model.weights), StatePool(model.config, 1, cpu))


def expected(runner: Runner, text: str, dimensions: int | None = None) -> torch.Tensor:
    mean: torch.Tensor = runner.forward([Segment(0, 0, list(text.encode()), None)]).mean(dim=0)[:dimensions]
    return torch.nn.functional.normalize(mean, dim=0)


def embed(server: Server, **body: Any) -> dict[str, Any]:
    response = server.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    return content


def test_embeddings_are_what_the_specification_computes(tiny: Server, runner: Runner) -> None:
    texts = ["a", LONG, "Hello, world", LONG]
    response = embed(tiny, input=texts, model="tiny")
    assert (response["object"], response["model"]) == ("list", "tiny")
    assert [each["index"] for each in response["data"]] == [0, 1, 2, 3]
    tokens = sum(len(text.encode()) for text in texts)
    assert response["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    for text, each in zip(texts, response["data"], strict=True):
        torch.testing.assert_close(torch.tensor(each["embedding"]), expected(runner, text), atol=1e-5, rtol=1e-4)
        assert math.isclose(math.hypot(*each["embedding"]), 1)


def test_embeddings_share_steps_with_responses_and_neither_changes(tiny: Server, runner: Runner) -> None:
    tiny.complete(prompt=LONG, max_tokens=2)  # its state is kept, and must not be begun with
    text = tiny.text(prompt="a", max_tokens=60, seed=1)
    stream = tiny.raw({"prompt": "a", "max_tokens": 60, "seed": 1, "stream": True})
    (each,) = embed(tiny, input=LONG)["data"]
    torch.testing.assert_close(torch.tensor(each["embedding"]), expected(runner, LONG), atol=1e-5, rtol=1e-4)
    stream.read_all()
    stream.close()
    assert tiny.text(prompt="a", max_tokens=60, seed=1) == text
    tiny.until_idle()


def test_the_official_client_reads_them(tiny: Server, runner: Runner) -> None:
    with tiny.openai() as client:
        plain = client.embeddings.create(model="tiny", input="Hello", encoding_format="float")
        packed = client.embeddings.create(model="tiny", input="Hello")  # it asks for base64, and unpacks it
        ids = client.embeddings.create(model="tiny", input=[list(b"Hello"), list(b"a")], dimensions=5)
    assert packed.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-6)
    assert ids.usage.prompt_tokens == 6
    got = torch.tensor(ids.data[0].embedding)
    torch.testing.assert_close(got, expected(runner, "Hello", 5), atol=1e-5, rtol=1e-4)


def test_texts_and_tokens_may_be_in_one_list(tiny: Server, runner: Runner) -> None:
    response = embed(tiny, input=["Hello", list(b"Hello"), "a", [97]])
    vectors = [torch.tensor(each["embedding"]) for each in response["data"]]
    assert torch.equal(vectors[0], vectors[1])
    assert torch.equal(vectors[2], vectors[3])
    torch.testing.assert_close(vectors[0], expected(runner, "Hello"), atol=1e-5, rtol=1e-4)
    assert response["usage"]["prompt_tokens"] == 12


def test_a_conversation_has_one_vector(tiny: Server, runner: Runner) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": None, "tool_calls": []}]
    for more, text in (
        ({}, "user: Hi\nassistant: \n"),
        ({"add_generation_prompt": True}, "user: Hi\nassistant: \nassistant:"),
        ({"truncate_prompt_tokens": 3, "input": None}, ": \n"),
    ):
        response = embed(tiny, messages=messages, **more)
        (each,) = response["data"]
        torch.testing.assert_close(torch.tensor(each["embedding"]), expected(runner, text), atol=1e-5, rtol=1e-4)
        assert response["usage"]["prompt_tokens"] == len(text)


@pytest.mark.parametrize(("most", "text"), [(3, "llo"), (5, "Hello"), (50, "Hello"), (-1, "Hello")])
def test_a_text_can_be_cut_to_its_end(tiny: Server, runner: Runner, most: int, text: str) -> None:
    (each,) = embed(tiny, input="Hello", truncate_prompt_tokens=most, request_id="r", normalize=True)["data"]
    torch.testing.assert_close(torch.tensor(each["embedding"]), expected(runner, text), atol=1e-5, rtol=1e-4)


def test_as_many_inputs_are_taken_as_openai_takes(tiny: Server) -> None:
    assert len(embed(tiny, input=["a"] * 2048)["data"]) == 2048


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": "a", "messages": [{"role": "user", "content": "a"}]}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": "a"}], "dimensions": 100_000}, "dimensions"),
        ({"messages": [{"role": "user", "content": "a" * 131073}]}, "messages"),
        ({"input": ["a", [1, "b"]]}, "input"),
        ({"input": ["a", [1], ""]}, "input[2]"),
        ({"input": ["a", [256]]}, "input[1]"),
        ({"input": "a", "truncate_prompt_tokens": 131073}, "truncate_prompt_tokens"),
        ({"input": "a", "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input": "a", "normalize": False}, "normalize"),
        ({}, "input"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", "", "b"]}, "input[1]"),
        ({"input": [[1], [2], []]}, "input[2]"),
        ({"input": [[1], [256]]}, "input[1]"),
        ({"input": ["a", "a" * 131073]}, "input[1]"),
        ({"input": [256]}, "input"),
        ({"input": 5}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a" * 131073}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 100_000}, "dimensions"),
        ({"input": "a", "dimensions": "5"}, "dimensions"),
        ({"input": "a", "user": 5}, "user"),
        ({"input": "a", "nonsense": 5}, "nonsense"),
    ],
)
def test_what_is_wrong_is_named(tiny: Server, body: dict[str, Any], param: str) -> None:
    error = tiny.refusal(body, PATH)
    assert error["param"] == param
    assert "prompt is empty" not in error["message"]
    assert tiny.refusal({"input": "a", "model": "gpt-4"}, PATH, 404)["param"] == "model"
