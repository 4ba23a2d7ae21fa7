"""Metrics of several processes make one page that Prometheus can read."""

from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bdh_batch.observability.merging import merge
from bdh_batch.observability.metrics import Metrics
from bdh_batch.observability.vllm_names import GAUGES, vllm_names


def exposition(value: float) -> bytes:
    registry = CollectorRegistry()
    Counter("requests", "Requests, of all kinds", ["kind"], registry=registry).labels('a "kind" {of}').inc(value)
    Gauge("load", "No labels", registry=registry).set(value)
    Histogram("seconds", "Times", buckets=(1, 2), registry=registry).observe(value)
    return generate_latest(registry)


def test_each_sample_says_whose_it_is_and_none_is_lost() -> None:
    pages = {"front-0": exposition(1), "engine-0": exposition(2)}
    merged = [*text_string_to_metric_families(merge(pages).decode())]
    alone = {name: [*text_string_to_metric_families(page.decode())] for name, page in pages.items()}
    assert [family.name for family in merged] == [family.name for family in alone["front-0"]]
    for at, family in enumerate(merged):
        assert (family.type, family.documentation) == (alone["front-0"][at].type, alone["front-0"][at].documentation)
        for name in pages:
            mine = [
                (sample.name, {k: v for k, v in sample.labels.items() if k != "process"}, sample.value)
                for sample in family.samples
                if sample.labels["process"] == name
            ]
            assert mine == [(sample.name, sample.labels, sample.value) for sample in alone[name][at].samples]


def test_of_none_there_is_nothing() -> None:
    assert merge({}) == b""


def load_of(model: str, running: int, waiting: int, usage: float) -> bytes:
    registry, values = CollectorRegistry(), {"running": running, "waiting": waiting}
    for name, value in {f"num_requests_{each}": float(n) for each, n in values.items()}.items():
        Gauge(f"bdh_{name}", "Load", ["model_name"], registry=registry).labels(model).set(value)
    Gauge("bdh_kv_cache_usage_perc", "Load", ["model_name"], registry=registry).labels(model).set(usage)
    Gauge("bdh_num_requests_waiting_for_godot", "Another one", ["model_name"], registry=registry).labels(model).set(9)
    return generate_latest(registry)


@pytest.mark.parametrize("model", ["tiny", 'a "name", {of} \\ odd=characters} 5'])
def test_under_vllms_names_a_model_has_one_sample_over_all_engines(model: str) -> None:
    page = merge({"engine-0": load_of(model, 2, 3, 0.5), "engine-1": load_of(model, 1, 0, 0.25)})
    found = {family.name: family for family in text_string_to_metric_families(vllm_names(page).decode())}
    samples = {name: [(each.labels, each.value) for each in family.samples] for name, family in found.items()}
    assert samples == {
        "vllm:num_requests_running": [({"model_name": model}, 3)],
        "vllm:num_requests_waiting": [({"model_name": model}, 3)],
        "vllm:kv_cache_usage_perc": [({"model_name": model}, 0.375)],
    }
    assert {family.type for family in found.values()} == {"gauge"}
    assert len(found) == len(GAUGES)


def test_models_are_kept_apart_and_one_that_is_not_loaded_has_no_sample() -> None:
    page = merge({"engine-0": load_of("a", 1, 1, 1), "engine-1": load_of("b", 2, 2, 0)}).decode()
    (running, *_) = text_string_to_metric_families(vllm_names(page.encode()).decode())
    assert {each.labels["model_name"]: each.value for each in running.samples} == {"a": 1, "b": 2}
    assert vllm_names(exposition(1)) == b""


@pytest.mark.parametrize("told", [True, False])
async def test_a_page_has_vllms_names_where_that_is_asked_for(told: bool) -> None:
    metrics = Metrics("tiny", told)
    text = "Sequences that wait"
    Gauge("bdh_num_requests_waiting", text, ["model_name"], registry=metrics.registry).labels("tiny").set(7)
    families = {family.name for family in text_string_to_metric_families((await metrics.page()).decode())}
    assert ("vllm:num_requests_waiting" in families) is told
