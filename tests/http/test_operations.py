"""What operators look at: models, probes, headers, metrics."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import openai
import pytest
from openai.types import Model

from bdh_batch import __version__

if TYPE_CHECKING:
    from tests.conftest import Server

COUNTERS = [
    *("bdh_prompt_tokens_total", "bdh_generation_tokens_total"),
    "bdh_request_success_total{finished_reason=length}",
    "bdh_http_requests_total{route=/v1/completions,status=200}",
]
HISTOGRAMS = [
    *("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds"),
    *("e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds"),
    *("request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens"),
    *("request_generation_tokens", "request_params_max_tokens", "iteration_tokens_total", "step_duration_seconds"),
    *("batch_occupancy", "request_params_n"),
]
GAUGES = ["bdh_num_requests_running", "bdh_num_requests_waiting", "bdh_state_slots_usage_perc"]


class TestModels:
    def test_are_listed(self, server: Server) -> None:
        with server.openai() as client:
            (model,) = client.models.list().data
        assert isinstance(model, Model)
        assert (model.id, model.object, model.owned_by) == ("bdh-shakespeare", "model", "bdh_batch")

    def test_are_found_by_name_and_alias(self, tiny: Server) -> None:
        with tiny.openai() as client:
            listed = client.models.list().data
            assert [each.id for each in listed][:2] == ["tiny", "minute"]
            assert [client.models.retrieve(each.id) for each in listed] == listed
        assert {each.model_dump()["root"] for each in listed} == {"tiny"}

    def test_are_as_old_as_they_are(self, server: Server) -> None:
        first = server.http.get("/v1/models").json()["data"][0]["created"]
        assert 0 < first < server.metrics()["process_start_time_seconds"]
        assert server.http.get("/v1/models/bdh-shakespeare").json()["created"] == first

    @pytest.mark.parametrize(
        "name", ["gpt-4", "org/model", "tiny/", "", "a%20b", "tiny/tiny", "é", "%F0%9F%8E%AD", "%ff"]
    )
    def test_that_are_unknown_are_not_found(self, tiny: Server, name: str) -> None:
        error = tiny.error(tiny.http.get(f"{tiny.url}/v1/models/{name}"), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")

    def test_that_are_unknown_are_the_clients_not_found_error(self, tiny: Server) -> None:
        with tiny.openai() as client, pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")


@pytest.mark.parametrize("path", ["/health", "/healthz", "/livez"])
def test_a_server_that_lives_says_so(server: Server, path: str) -> None:
    response = server.http.get(path)
    assert (response.status_code, response.json()) == (200, {"status": "ok"})
    assert server.http.head(path).status_code == 200


@pytest.mark.parametrize("path", ["/readyz", "/ready"])
def test_a_server_that_is_ready_says_so(server: Server, path: str) -> None:
    response = server.http.get(path)
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


def test_the_root_says_what_this_is(server: Server) -> None:
    assert server.http.get("/").json() == {"name": "bdh_batch", "version": __version__, "status": "ready"}


class TestHeaders:
    PATHS = pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/nothing", "/v1/completions"])

    @PATHS
    def test_every_response_has_an_id_of_its_own(self, tiny: Server, path: str) -> None:
        ids = {tiny.http.get(path).headers["x-request-id"] for _ in range(3)}
        assert len(ids) == 3
        assert all(re.fullmatch(r"[0-9a-f]{32}", id) for id in ids)

    @PATHS
    def test_every_response_says_how_long_it_took(self, tiny: Server, path: str) -> None:
        assert int(tiny.http.get(path).headers["openai-processing-ms"]) >= 0

    @PATHS
    @pytest.mark.parametrize("id", ["my-id", "a" * 128, "unique/42!{}"])
    def test_a_clients_id_is_kept(self, tiny: Server, path: str, id: str) -> None:
        assert tiny.http.get(path, headers={"x-request-id": id}).headers["x-request-id"] == id

    @pytest.mark.parametrize("id", [b"", b"a" * 129, b"a b", b"a\tb", b"\xff", b"\xc3\xbc"])
    def test_an_id_that_could_do_harm_in_a_log_is_replaced(self, tiny: Server, id: bytes) -> None:
        response = tiny.http.get("/health", headers=[(b"x-request-id", id)])
        assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])

    def test_the_id_is_the_responses(self, tiny: Server) -> None:
        for path, prefix, body in (
            ("/v1/completions", "cmpl-", {"prompt": "a"}),
            ("/v1/chat/completions", "chatcmpl-", {"messages": [{"role": "user", "content": "a"}]}),
        ):
            response = tiny.http.post(path, json=body | {"max_tokens": 1}, headers={"x-request-id": "mine"})
            assert response.json()["id"] == f"{prefix}mine"

    def test_streams_have_them_too(self, tiny: Server) -> None:
        with tiny.openai() as client:
            raw = client.completions.with_raw_response.create(
                model="tiny", prompt="a", max_tokens=2, stream=True, extra_headers={"x-request-id": "mine"}
            )
            for _ in raw.parse():
                pass
        assert raw.headers["x-request-id"] == "mine"
        assert int(raw.headers["openai-processing-ms"]) >= 0

    def test_no_response_names_the_software_below(self, tiny: Server) -> None:
        assert "server" not in tiny.http.get("/health").headers


class TestMetrics:
    def test_are_prometheus_text(self, server: Server) -> None:
        server.until_alone()
        response = server.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        assert 'bdh_num_requests_running{model_name="bdh-shakespeare"} 0.0' in response.text.splitlines()

    def test_gauges_are_zero_at_rest(self, server: Server) -> None:
        server.until_alone()
        found = server.metrics()
        assert [found[gauge] for gauge in GAUGES] == [0, 0, 0]

    def test_gauges_are_right_while_work_runs(self, tiny: Server) -> None:
        tiny.until_alone()
        streams = [tiny.raw({"prompt": "a", "max_tokens": 100_000, "stream": True, "n": n}) for n in (1, 2)]
        for stream in streams:
            stream.read_until(b"data: ")
        found = tiny.metrics()
        for stream in streams:
            stream.close()
        assert (found["bdh_num_requests_running"], found["bdh_num_requests_waiting"]) == (3, 0)
        assert found["bdh_state_slots_usage_perc"] == pytest.approx(
            3 / 192
        )  # three eighths of 512 states are for sequences
        assert found["bdh_kv_cache_usage_perc"] == found["bdh_state_slots_usage_perc"]
        assert found["bdh_http_requests_in_flight"] == 3
        tiny.until_idle()

    def test_count_what_happens(self, tiny: Server) -> None:
        tiny.until_alone()
        before = tiny.metrics()
        tiny.complete(prompt="abc", max_tokens=5)
        tiny.complete(prompt=["abcd", "ef"], max_tokens=2)
        after = tiny.metrics()
        moved = {name: after[name] - before.get(name, 0) for name in after}
        assert [moved[counter] for counter in COUNTERS] == [9, 9, 3, 2]
        assert moved["bdh_request_prompt_tokens_sum"] == 9
        assert moved["bdh_request_generation_tokens_sum"] == 9
        assert moved["bdh_request_params_max_tokens_sum"] == 9
        for name in HISTOGRAMS[:11]:
            count = moved[f"bdh_{name}_count"]
            assert count == (6 if name == "inter_token_latency_seconds" else 3), name
            assert moved[f"bdh_{name}_bucket{{le=+Inf}}"] == count
        steps = moved["bdh_step_duration_seconds_count"]
        assert steps == moved["bdh_batch_occupancy_count"] == moved["bdh_iteration_tokens_total_count"]
        assert 7 <= steps <= 9  # 5 + 2, or more where the two prompts did not come in one step
        assert moved["bdh_batch_occupancy_sum"] == 9
        assert moved["bdh_iteration_tokens_total_sum"] == 9 + 9 - 3  # a last token enters no state

    @pytest.mark.parametrize("name", HISTOGRAMS)
    def test_histograms_have_buckets_and_the_model(self, tiny: Server, name: str) -> None:
        text = tiny.http.get("/metrics").text
        assert f"# TYPE bdh_{name} histogram" in text
        assert f'bdh_{name}_count{{model_name="tiny"}}' in text

    def test_report_the_memory_for_states(self, tiny: Server) -> None:
        (reported,) = [name for name in tiny.metrics() if name.startswith("bdh_cache_config_info")]
        facts = dict(
            fact.split("=") for fact in reported.removeprefix("bdh_cache_config_info{").removesuffix("}").split(",")
        )
        assert facts == {
            "num_gpu_blocks": "512",
            "num_cpu_blocks": "0",
            "block_size": "131072",
            "cache_dtype": "float32",
            "enable_prefix_caching": "True",
            "sliding_window": "None",
        }

    def test_have_the_latency_between_tokens_under_both_of_its_names(self, tiny: Server) -> None:
        tiny.complete(prompt="a", max_tokens=5)
        found = tiny.metrics()
        ours, older = (
            {sample.partition("_seconds_")[2]: value for sample, value in found.items() if sample.startswith(name)}
            for name in ("bdh_inter_token_latency", "bdh_time_per_output_token")
        )
        assert ours == older
        assert ours["count"] >= 4

    def test_count_how_requests_end(self, server: Server) -> None:
        text = server.text(prompt="a", max_tokens=4, temperature=0)
        name = "bdh_request_success_total{{finished_reason={}}}".format
        before = server.metrics()
        server.complete(prompt="a", max_tokens=4, temperature=0, stop=text[2])
        left = server.raw({"prompt": "a", "max_tokens": 100_000, "stream": True})
        left.read_until(b"data: ")
        left.close()
        server.until_idle()
        after = server.metrics()
        for reason in ("stop", "abort"):
            assert after[name(reason)] == before.get(name(reason), 0) + 1

    def test_count_refusals_by_route_and_status(self, tiny: Server) -> None:
        name = "bdh_http_requests_total{{route={},status={}}}".format
        tiny.until_alone()
        before = tiny.metrics()
        tiny.refusal({"prompt": ""})
        tiny.http.get("/nothing")
        tiny.http.get("/nowhere")
        tiny.http.get("/v1/models/none")
        after = tiny.metrics()
        moved = {key: after[key] - before.get(key, 0) for key in after if key.startswith("bdh_http_requests_total")}
        assert moved[name("/v1/completions", 400)] == 1
        assert moved[name("other", 404)] == 2
        assert moved[name("/v1/models/{id}", 404)] == 1

    def test_have_no_label_that_clients_can_make_up(self, tiny: Server) -> None:
        for at in range(20):
            tiny.http.get(f"/path-{at}")
            tiny.http.get(f"/v1/models/name-{at}")
            tiny.refusal({"model": f"model-{at}", "prompt": "a"}, status=404)
        text = tiny.http.get("/metrics").text
        assert not re.search(r"(path|name|model)-\d", text)
