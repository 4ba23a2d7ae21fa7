"""Metrics of several processes make one page that Prometheus can read."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bdh_batch.observability.merging import merge


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
