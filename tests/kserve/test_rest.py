"""KServe over REST: tritonclient's HTTP clients, the binary extension, generate and generate_stream."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.http as triton
import tritonclient.http.aio
from tritonclient.utils import InferenceServerException

from tests.kserve.support import triton_input

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import Server

MODEL = "/v2/models/tiny"
PROMPT = {"name": "prompt", "datatype": "BYTES", "shape": [1], "data": ["ROMEO:"]}


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[Any]:
    with triton.InferenceServerClient(f"127.0.0.1:{tiny.port}", network_timeout=300.0) as client:
        yield client


def refusal(tiny: Server, path: str, status: int, **request: Any) -> dict[str, Any]:
    """The error of a POST; it must be as KServe's are."""
    response = tiny.http.post(path, **request)
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()
    assert error.keys() == {"error", "type", "param", "code"}
    assert isinstance(error["error"], str)
    return error


def events(tiny: Server, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    with tiny.http.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        raw = b"".join(response.iter_raw())
    *frames, rest = raw.decode().split("\n\n")
    assert rest == ""
    return [json.loads(frame.removeprefix("data: ")) for frame in frames]


class TestTritonClient:
    def test_probes(self, client: Any, tiny: Server) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("tiny")
        assert client.is_model_ready("tiny", "1")
        assert not client.is_model_ready("none")
        assert client.get_server_metadata()["name"] == "bdh_batch"
        assert client.get_model_metadata("tiny")["versions"] == ["1"]

    @pytest.mark.parametrize("binary", [True, False])
    @pytest.mark.parametrize("compressed", [None, "gzip"])
    def test_infers_what_a_completion_is(self, client: Any, tiny: Server, binary: bool, compressed: str | None) -> None:
        given = np.array(["ROMEO:", "é"], np.object_)
        prompt = triton.InferInput("prompt", [2], "BYTES")
        prompt.set_data_from_numpy(given, binary_data=binary)
        temperature = triton.InferInput("temperature", [1], "FP32")
        temperature.set_data_from_numpy(np.array([0.7], np.float32), binary_data=binary)
        result = client.infer(
            "tiny",
            [prompt, temperature],
            outputs=[triton.InferRequestedOutput(name, binary) for name in ("text", "completion_tokens")],
            request_id="r",
            parameters={"max_tokens": 8, "seed": 3},
            request_compression_algorithm=compressed,
        )
        expected = tiny.complete(prompt=["ROMEO:", "é"], temperature=0.7, max_tokens=8, seed=3)
        texts = [each.decode() if isinstance(each, bytes) else each for each in result.as_numpy("text")]
        assert texts == [choice["text"] for choice in expected["choices"]]
        assert result.as_numpy("completion_tokens").tolist() == [16]
        assert result.get_response()["id"] == "r"

    def test_gets_binary_outputs_where_it_names_none(self, client: Any) -> None:
        result = client.infer("tiny", [triton_input("prompt", "BYTES", ["a"], triton.InferInput)])
        assert result.as_numpy("finish_reason").tolist() in ([b"length"], [b"stop"])

    async def test_by_the_async_client(self, tiny: Server) -> None:
        async with tritonclient.http.aio.InferenceServerClient(f"127.0.0.1:{tiny.port}") as client:
            inputs = [triton_input("prompt", "BYTES", ["a"], triton.InferInput)]
            result = await client.infer("tiny", inputs, parameters={"max_tokens": 4, "seed": 1})
        assert result.as_numpy("text")[0].decode() == tiny.text(prompt="a", max_tokens=4, seed=1)

    def test_reads_errors(self, client: Any) -> None:
        inputs = [triton_input("prompt", "BYTES", ["a"], triton.InferInput)]
        with pytest.raises(InferenceServerException, match="temperature: Input should be less than or equal to 2"):
            client.infer("tiny", inputs, parameters={"temperature": 3.0})
        with pytest.raises(InferenceServerException, match="'none' does not exist"):
            client.infer("none", inputs)


class TestInfer:
    def test_in_plain_json(self, tiny: Server) -> None:
        body = {"inputs": [PROMPT], "parameters": {"max_tokens": 5, "seed": 2, "stop": ["zz"]}, "id": "a"}
        response = tiny.http.post(f"{MODEL}/versions/1/infer", json=body).json()
        found = {output["name"]: output["data"] for output in response["outputs"]}
        assert (response["model_name"], response["model_version"], response["id"]) == ("tiny", "1", "a")
        assert found["text"] == [tiny.text(prompt="ROMEO:", max_tokens=5, seed=2, stop=["zz"])]

    @pytest.mark.parametrize(
        ("change", "param"),
        [
            ({"inputs": []}, "inputs"),
            ({"inputs": [PROMPT | {"shape": [2]}]}, "prompt"),
            ({"inputs": [PROMPT | {"shape": [-1]}]}, "inputs[0].shape[0]"),
            ({"inputs": [PROMPT | {"data": [1]}]}, "prompt"),
            ({"inputs": [PROMPT | {"datatype": "TEXT"}]}, "inputs[0].datatype"),
            ({"inputs": [PROMPT | {"data": None}]}, "inputs[0].data"),
            ({"inputs": [PROMPT | {"parameters": {"binary_data_size": 4}}]}, "inputs[0].data"),
            (
                {"inputs": [PROMPT | {"data": None, "parameters": {"binary_data_size": 4}}]},
                "inputs[0].parameters.binary_data_size",
            ),
            ({"inputs": [PROMPT | {"parameters": {"shared_memory_region": "a"}}]}, None),
            ({"outputs": [{"name": "logits"}]}, "outputs[0].name"),
            ({"parameters": {"spare": 1}}, "spare"),
            ({"parameters": {"stream": True}}, "stream"),
            ({"parameters": {"max_tokens": "5"}}, "max_tokens"),
            ({"parameters": {"model": "tiny"}}, "model"),
            ({"parameters": {"timeout": "1"}}, "timeout"),
            ({"spare": 1}, "spare"),
        ],
    )
    def test_refuses_by_name(self, tiny: Server, change: dict[str, Any], param: str | None) -> None:
        error = refusal(tiny, f"{MODEL}/infer", 400, json={"inputs": [PROMPT]} | change)
        assert param is None or error["param"] == param

    @pytest.mark.parametrize("length", ["-1", "999", "a", "", "1e2", "9" * 30])
    def test_refuses_a_length_that_is_none(self, tiny: Server, length: str) -> None:
        headers = {"inference-header-content-length": length, "content-type": "application/octet-stream"}
        error = refusal(tiny, f"{MODEL}/infer", 400, content=json.dumps({"inputs": [PROMPT]}), headers=headers)
        assert error["param"] == "inference-header-content-length"

    def test_refuses_bytes_that_are_no_inputs(self, tiny: Server) -> None:
        text = json.dumps({"inputs": [PROMPT]})
        headers = {"inference-header-content-length": str(len(text))}
        error = refusal(tiny, f"{MODEL}/infer", 400, content=text + "spare", headers=headers)
        assert "5 bytes behind the JSON" in error["error"]

    def test_paths_that_are_not_there_have_errors_of_this_api(self, tiny: Server) -> None:
        for path, status in (("/v2/nothing", 404), (f"{MODEL}/versions/2/infer", 404), ("/v2/models/none/infer", 404)):
            refusal(tiny, path, status, json={"inputs": [PROMPT]})
        refusal(tiny, f"{MODEL}/infer", 415, content="a", headers={"content-type": "text/plain"})
        refusal(tiny, f"{MODEL}/infer", 413, content=b" " * 5_000_000)
        assert tiny.http.get(f"{MODEL}/infer").status_code in (404, 405)


class TestGenerate:
    def test_returns_one_completion(self, tiny: Server) -> None:
        expected = tiny.complete(prompt="ROMEO:", max_tokens=6, seed=1)
        body: dict[str, Any] = {"text_input": "ROMEO:", "parameters": {"max_tokens": 6, "seed": 1}}
        found = tiny.http.post(f"{MODEL}/generate", json=body).json()
        assert found == {
            **{"model_name": "tiny", "model_version": "1", "text_output": expected["choices"][0]["text"]},
            **{"finish_reason": "length", "usage": expected["usage"]},
        }
        body = {"prompt": "ROMEO:", "max_tokens": 6, "seed": 1, "id": "a", "logprobs": 1, "return_token_ids": True}
        found = tiny.http.post(f"{MODEL}/versions/1/generate", json=body).json()
        assert found["text"] == expected["choices"][0]["text"]
        assert found["id"] == "a"
        assert len(found["token_ids"]) == len(found["logprobs"]["tokens"]) == 6

    def test_streams(self, tiny: Server) -> None:
        for name, text in (("text_input", "text_output"), ("prompt", "token")):
            body = {name: "ROMEO:", "parameters": {"max_tokens": 6, "seed": 1}}
            *steps, last = events(tiny, f"{MODEL}/generate_stream", body)
            assert "".join(step[text] for step in steps) == tiny.text(prompt="ROMEO:", max_tokens=6, seed=1)
            assert not any(step["done"] or step["finish_reason"] for step in steps)
            assert (last[text], last["finish_reason"], last["done"]) == ("", "length", True)
            assert last["usage"]["completion_tokens"] == 6

    def test_a_stream_that_fails_ends_with_an_error(self, tiny: Server) -> None:
        body = {"text_input": "a", "parameters": {"max_tokens": 100_000, "ignore_eos": True}}
        headers = {"x-request-timeout": "0.5"}
        with tiny.http.stream("POST", f"{MODEL}/generate_stream", json=body, headers=headers) as response:
            raw = b"".join(response.iter_raw())
        *_, last = raw.decode().removesuffix("\n\n").split("\n\n")
        assert json.loads(last.removeprefix("data: "))["code"] == "request_timeout"

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({}, "text_input"),
            ({"text_input": "a", "prompt": "a"}, "text_input"),
            ({"text_input": ""}, "text_input"),
            ({"text_input": ["a"]}, "text_input"),
            ({"text_input": "a", "parameters": {"n": 2}}, "n"),
            ({"text_input": "a", "parameters": {"prompt": "b"}}, "parameters.prompt"),
            ({"text_input": "a", "seed": 1, "parameters": {"seed": 2}}, "parameters.seed"),
            ({"text_input": "a", "parameters": {"max_new_tokens": 2}}, "max_new_tokens"),
            ({"text_input": "a", "stream": True}, "stream"),
        ],
    )
    def test_refuses_by_name(self, tiny: Server, body: dict[str, Any], param: str) -> None:
        assert refusal(tiny, f"{MODEL}/generate", 400, json=body)["param"] == param


def test_whether_outputs_are_binary_is_a_boolean(tiny: Server) -> None:
    body = {"inputs": [PROMPT], "parameters": {"binary_data_output": "yes"}}
    assert refusal(tiny, f"{MODEL}/infer", 400, json=body)["param"] == "binary_data_output"
