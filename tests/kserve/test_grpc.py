"""ModelInfer and what surrounds it, by tritonclient and by gRPC's own client."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import InferRequestedOutput, service_pb2 as pb
from tritonclient.utils import InferenceServerException

from bdh_batch.http.errors import STATUS
from bdh_batch.kserve.status import CODES
from tests.kserve.support import add, outputs, request, triton_input

if TYPE_CHECKING:
    from tests.kserve.support import Worker

PROMPTS = ["ROMEO:", "JULIET: é"]


class TestOneIsAnsweredAsACompletionIs:
    @pytest.mark.parametrize("temperature", [0.0, 0.7])
    def test_with_typed_contents(self, worker: Worker, temperature: float) -> None:
        asked = request("tiny", PROMPTS, "r-1", seed=7)
        add(asked, "max_tokens", "INT32", [1], [9])
        add(asked, "temperature", "FP32", [1], [temperature])
        add(asked, "top_p", "FP32", [1], [0.9])
        add(asked, "top_k", "INT32", [1], [40])
        completion = worker.server.complete(
            prompt=PROMPTS, max_tokens=9, temperature=temperature, top_p=0.9, top_k=40, seed=7, return_token_ids=True
        )
        found = worker.infer(asked)
        choices, usage = completion["choices"], completion["usage"]
        assert found["text"] == [choice["text"] for choice in choices]
        assert found["finish_reason"] == [choice["finish_reason"] for choice in choices]
        assert found["token_ids"] == [token for choice in choices for token in choice["token_ids"]]
        assert found["token_count"] == [len(choice["token_ids"]) for choice in choices]
        assert found["prompt_tokens"] == [usage["prompt_tokens"]]
        assert found["completion_tokens"] == [usage["completion_tokens"]]
        assert "prompt_token_ids" not in found

    def test_with_raw_contents(self, worker: Worker) -> None:
        inputs = [triton_input("prompt", "BYTES", PROMPTS), triton_input("max_tokens", "INT64", [9])]
        result = worker.triton.infer("tiny", inputs, request_id="r-2", parameters={"seed": 7, "temperature": 0.7})
        expected = worker.server.complete(prompt=PROMPTS, max_tokens=9, temperature=0.7, seed=7)["choices"]
        assert result.get_response().id == "r-2"
        assert result.as_numpy("text").tolist() == [choice["text"].encode() for choice in expected]
        assert result.as_numpy("completion_tokens").dtype == np.int32

    async def test_by_the_async_client_many_at_a_time(self, worker: Worker) -> None:
        async with tritonclient.grpc.aio.InferenceServerClient(worker.address) as client:

            async def text(seed: int) -> bytes:
                inputs = [triton_input("prompt", "BYTES", ["a"]), triton_input("max_tokens", "INT32", [4])]
                result = await client.infer("tiny", inputs, parameters={"seed": seed})
                found: bytes = result.as_numpy("text")[0]
                return found

            texts = await asyncio.gather(*map(text, range(16)))
        expected = [worker.server.text(prompt="a", max_tokens=4, seed=seed) for seed in range(16)]
        assert [each.decode() for each in texts] == expected

    def test_with_all_that_a_completion_can_be_asked(self, worker: Worker) -> None:
        fields: dict[str, Any] = {
            **{"max_tokens": 6, "seed": 3, "n": 2, "best_of": 3, "echo": True, "logprobs": 2, "prompt_logprobs": 1},
            **{"return_token_ids": True, "stop": ["zz", "yy"], "logit_bias": {"65": 1.5}, "min_p": 0.01},
        }
        asked = request("tiny", ["ab", "c"])
        for name in ("max_tokens", "seed", "n", "best_of", "logprobs", "prompt_logprobs"):
            asked.parameters[name].int64_param = fields[name]
        for name in ("echo", "return_token_ids"):
            asked.parameters[name].bool_param = fields[name]
        asked.parameters["min_p"].double_param = fields["min_p"]
        asked.parameters["logit_bias"].string_param = json.dumps(fields["logit_bias"])
        add(asked, "stop", "BYTES", [2], [b"zz", b"yy"])
        found = worker.infer(asked)
        choices = worker.server.complete(prompt=["ab", "c"], **fields)["choices"]
        assert found["text"] == [choice["text"] for choice in choices]
        for name in ("logprobs", "prompt_logprobs"):
            assert [json.loads(each) for each in found[name]] == [choice[name] for choice in choices]
        assert found["prompt_token_ids"] == [token for choice in choices for token in choice["prompt_token_ids"]]
        assert found["prompt_token_count"] == [2, 2, 1, 1]

    def test_with_token_ids_as_prompts(self, worker: Worker) -> None:
        asked = pb.ModelInferRequest(model_name="tiny")
        asked.parameters["seed"].int64_param = 1
        asked.parameters["max_tokens"].int64_param = 5
        add(asked, "prompt", "INT64", [2, 2], [97, 98, 99, 100])
        assert worker.infer(asked)["text"] == [
            choice["text"] for choice in worker.server.complete(prompt=["ab", "cd"], max_tokens=5, seed=1)["choices"]
        ]

    def test_of_a_schema(self, worker: Worker) -> None:
        schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"]}
        asked = request("tiny", structured_outputs=json.dumps({"json": schema}), max_tokens=60)
        assert json.loads(worker.infer(asked)["text"][0])["a"] in (1, 2)

    def test_with_the_outputs_that_were_asked_for(self, worker: Worker) -> None:
        inputs = [triton_input("prompt", "BYTES", ["a"]), triton_input("max_tokens", "INT32", [2])]
        result = worker.triton.infer("tiny", inputs, outputs=[InferRequestedOutput("finish_reason")])
        assert [each.name for each in result.get_response().outputs] == ["finish_reason"]

    def test_under_an_alias_and_without_a_name(self, worker: Worker) -> None:
        for name in ("generate", ""):
            assert worker.infer(request(name, max_tokens=1))["finish_reason"] == ["length"]


class TestMetadata:
    def test_say_what_is_there(self, worker: Worker) -> None:
        assert worker.triton.is_server_live()
        assert worker.triton.is_server_ready()
        assert worker.triton.is_model_ready("tiny", "1")
        assert worker.triton.get_server_metadata().name == "bdh_batch"
        model = worker.triton.get_model_metadata("tiny")
        assert list(model.versions) == ["1"]
        assert {(each.name, each.datatype) for each in model.inputs} == {
            *(("prompt", "BYTES"), ("max_tokens", "INT32"), ("temperature", "FP32"), ("top_p", "FP32")),
            ("top_k", "INT32"),
        }
        assert {"text", "token", "finish_reason", "token_ids"} <= {each.name for each in model.outputs}

    def test_of_a_model_have_its_fingerprint(self, worker: Worker) -> None:
        call = worker.channel.unary_unary("/inference.GRPCInferenceService/ModelMetadata")
        _, done = call.with_call(pb.ModelMetadataRequest(name="tiny").SerializeToString())
        card = worker.server.http.get("/v1/models/tiny").json()
        assert dict(done.trailing_metadata())["x-model-fingerprint"] == card["fingerprint"]

    def test_of_what_is_not_there(self, worker: Worker) -> None:
        for ask in (worker.triton.get_model_metadata, worker.triton.is_model_ready):
            for model in (("none",), ("tiny", "2")):
                with pytest.raises(InferenceServerException) as refused:
                    ask(*model)
                assert refused.value.status() == "StatusCode.NOT_FOUND"

    def test_a_request_has_an_id(self, worker: Worker) -> None:
        call = worker.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        raw = request("tiny", max_tokens=1).SerializeToString()
        for given, known in ((("x-request-id", "mine"), True), (("x-request-id", "a b"), False)):
            _, done = call.with_call(raw, metadata=[given])
            returned = dict(done.trailing_metadata())["x-request-id"]
            assert (returned == given[1]) == known
            assert returned

    def test_health_and_reflection_are_on(self, worker: Worker) -> None:
        health = health_pb2_grpc.HealthStub(worker.channel)
        serving = health_pb2.HealthCheckResponse.SERVING
        for service in ("", "inference.GRPCInferenceService"):
            assert health.Check(health_pb2.HealthCheckRequest(service=service)).status == serving
        watching = health.Watch(health_pb2.HealthCheckRequest())
        assert next(iter(watching)).status == serving
        watching.cancel()
        with pytest.raises(grpc.RpcError) as refused:
            health.Check(health_pb2.HealthCheckRequest(service="none"))
        assert refused.value.code() == grpc.StatusCode.NOT_FOUND
        asked = reflection_pb2.ServerReflectionRequest(list_services="")
        stub = reflection_pb2_grpc.ServerReflectionStub(worker.channel)
        (told,) = stub.ServerReflectionInfo(iter([asked]))
        services = {each.name for each in told.list_services_response.service}
        assert {"inference.GRPCInferenceService", "grpc.health.v1.Health"} <= services

    def test_calls_are_counted_as_requests_are(self, worker: Worker) -> None:
        name = "bdh_http_requests_total{{route=/inference.GRPCInferenceService/{},status={}}}".format
        before = worker.server.metrics()
        worker.infer(request("tiny", max_tokens=1))
        worker.refused("ModelInfer", request("none", max_tokens=1))
        list(worker.stream([request("tiny", max_tokens=1), request("tiny", max_tokens=0)]))
        after = worker.server.metrics()
        for key in (name("ModelInfer", 200), name("ModelInfer", 404), name("ModelStreamInfer", 200)):
            assert after[key] - before.get(key, 0) == 1
        assert after[name("ModelStreamInfer", 400)] - before.get(name("ModelStreamInfer", 400), 0) == 1
        worker.server.until(lambda metrics: metrics["bdh_http_requests_in_flight"] == 1)  # the scrape


class TestRefusals:
    def test_have_the_message_that_a_completion_has(self, worker: Worker) -> None:
        wrong: dict[str, Any] = {"temperature": 3, "max_tokens": -1, "top_p": 2, "spare": 1, "suffix": "a"}
        for field, value in wrong.items():
            error = worker.server.refusal({"prompt": "a", field: value})
            asked = request("tiny", ["a"], "", **{field: value})
            code, text, trailers = worker.refused("ModelInfer", asked)
            assert code == grpc.StatusCode.INVALID_ARGUMENT
            assert error["message"] in text
            assert trailers["error-param"] == field

    def test_a_status_has_every_error(self) -> None:
        assert {status for status, _ in STATUS.values()} <= CODES.keys()

    def test_of_a_deadline(self, worker: Worker) -> None:
        code, _, _ = worker.refused("ModelInfer", request("tiny", max_tokens=100_000, ignore_eos=True), timeout=0.3)
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        asked = request("tiny", max_tokens=100_000, ignore_eos=True, timeout=200_000)
        code, _, _ = worker.refused("ModelInfer", asked)
        assert code == grpc.StatusCode.DEADLINE_EXCEEDED
        worker.server.until_idle()

    def test_a_cancelled_call_ends_what_it_started(self, worker: Worker) -> None:
        call = worker.channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        under_way = call.future(request("tiny", max_tokens=100_000, ignore_eos=True).SerializeToString())
        worker.server.until(lambda metrics: metrics["bdh_num_requests_running"] == 1)
        under_way.cancel()
        worker.server.until_idle()


def test_the_examples_of_the_page_run(worker: Worker, capsys: pytest.CaptureFixture[str]) -> None:
    page = (Path(__file__).parent.parent.parent / "docs" / "kserve.md").read_text("utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        source = block.replace("127.0.0.1:8001", worker.address).replace("bdh-shakespeare", "tiny")
        exec(compile(source, "kserve.md", "exec", dont_inherit=True), {"__name__": "example"})
        assert capsys.readouterr().out.strip()


def test_contents_that_are_asked_raw_are_returned_raw(worker: Worker) -> None:
    inputs = [triton_input("prompt", "BYTES", ["a"]), triton_input("max_tokens", "INT32", [2])]
    raw = worker.triton.infer("tiny", inputs).get_response()
    typed = pb.ModelInferResponse.FromString(worker.call("ModelInfer", request("tiny", ["a"], max_tokens=2)))
    assert len(raw.raw_output_contents) == len(raw.outputs)
    assert not typed.raw_output_contents
    assert outputs(typed)["completion_tokens"] == [2]
