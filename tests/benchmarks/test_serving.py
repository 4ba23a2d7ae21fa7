"""The serving benchmark's pure parts, and its client against a real server; scenarios of servers are not run here."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from bdh_batch.bench.strain import Watch
from bdh_batch.checkpoint.checkpoint import load_model
from bdh_batch.engine.runner import Runner
from bdh_batch.engine.state_pool import StatePool
from bdh_batch.kernels.torch_reference import TorchKernels
from benchmarks.client import Response
from benchmarks.engine.static import LEAST, MOST, Job, continuous, heavy_tailed, ideal, static
from benchmarks.served import Served
from benchmarks.server.serving.common import percentile, refuse_unless, strained, text
from benchmarks.server.serving.long_prompt import gap_figures, gaps
from benchmarks.server.serving.shared_prefix import prefix_figures
from benchmarks.server.serving.tenants import jain, shares
from tests.conftest import Server
from tests.kernels.support import CONFORMANCE

SAME = Response(0.0, prompt=[1, 2, 3], times=[0.5, 1.0, 1.5, 4.0], tokens=[7, 7, 7, 7])


def test_percentiles_are_values_that_were_measured() -> None:
    values = random.Random(1).sample(range(1, 101), 100)
    assert [percentile(values, share) for share in (0.01, 0.5, 0.99, 1.0)] == [1, 50, 99, 100]
    assert percentile([3.0], 0.5) == percentile([3.0], 0.99) == 3.0
    assert percentile([1, 2, 3], 0.5) == 2


def test_jains_index_is_one_where_all_have_the_same_and_a_share_where_one_has_all() -> None:
    assert jain([5, 5]) == 1.0
    assert jain([5, 0, 0, 0]) == 0.25
    assert jain([2, 1]) == pytest.approx(0.9)


def test_gaps_are_those_that_lie_in_a_window() -> None:
    assert gaps([SAME, SAME], (0.0, 2.0)) == [0.5] * 4
    assert gaps([SAME], (0.9, 4.0)) == [0.5, 2.5]
    figures = gap_figures([SAME], [((0.0, 1.6), (0.9, 4.0))] * 3)
    assert figures["p99_gap_ratio"]["value"] == 5.0
    assert figures["without_p99_gap_ms"] == 500.0
    assert figures["beside_max_gap_ms"] == 2500.0


def test_what_a_tenant_was_served_is_what_came_in_the_window() -> None:
    found = shares([[SAME], [SAME, SAME]], (0.0, 1.2))
    assert found["generated"] == [2, 4]
    assert found["prompts"] == [3, 6]
    assert found["jain"] == pytest.approx(0.9)
    assert shares([[SAME], [SAME]], (0.7, 5.0))["prompts"] == [0, 0]


def test_a_shared_prefix_that_is_computed_once_is_the_least() -> None:
    responses = [Response(0.0, prompt=[1, 2, 3, 4, tail], times=[seconds]) for tail, seconds in ((5, 1.0), (6, 2.0))]
    figures = prefix_figures({"kept": responses, "not_kept": responses}, {"kept": 6, "not_kept": 10})
    assert figures["shared_tokens"] == 4
    assert figures["least_tokens"] == 6
    assert figures["computed_to_least"] == 1.0
    assert figures["ratio_to_not_kept"]["value"] == 1.0


def test_texts_begin_like_no_other() -> None:
    draw = random.Random(0)
    texts = [text(draw, length) for length in (20, 64, 20_000)]
    assert [len(one.encode()) for one in texts] == [20, 64, 20_000]
    assert len({one[:12] for one in texts}) == 3


def test_no_figure_where_texts_differ() -> None:
    refuse_unless(True, "Texts differ")
    with pytest.raises(SystemExit, match="Texts differ: no figure is worth printing"):
        refuse_unless(False, "Texts differ")


def test_lengths_have_a_heavy_tail_and_bounds() -> None:
    lengths = heavy_tailed(1000, 48.0, 1.0, 0)
    assert min(lengths) == LEAST
    assert max(lengths) == MOST
    assert 40 < percentile(lengths, 0.5) < 56
    assert ideal([4, 4, 4, 4], 2) == 1.0
    assert ideal([1, 3, 2, 2, 5], 2) == 2 * (3 + 2 + 5) / 13


async def test_all_ways_of_batching_give_the_same_completions() -> None:
    model = load_model(CONFORMANCE / "tiny", torch.float32, torch.device("cpu"))
    runner = Runner(TorchKernels(model.weights, 0), StatePool(model.config, 3, torch.device("cpu")))
    jobs = [Job(list(range(1, 4 + n)), length, seed=n) for n, length in enumerate((1, 7, 3, 4, 2, 5, 1))]
    found = await continuous(runner, jobs, 3, prefill_tokens=8)
    assert [len(response) for response in found] == [job.length for job in jobs]
    for padded in (True, False):
        assert static(runner, jobs, 3, 8, padded) == found


async def test_the_client_reads_what_the_server_says(tiny: Server) -> None:
    served = Served(tiny.port)
    body: dict[str, Any] = {"prompt": "The client reads.", "max_tokens": 12, "temperature": 0.0}
    async with Watch() as watch:
        response = await served.ask(**body)
        left = await (await served.send(**body)).leave()
    assert response.tokens == tiny.complete(**body, return_token_ids=True)["choices"][0]["token_ids"]
    assert bytes(response.prompt) == b"The client reads."
    assert len(response.times) == 12
    assert 0 < response.first <= response.times[-1] - response.sent
    assert not left.complete
    assert served.metric("bdh_prompt_tokens_total") >= len(response.prompt)
    assert strained(watch)["cpu_share"] > 0
    with pytest.raises(RuntimeError, match=r"status 400: .*max_tokens"):
        await served.ask(prompt="a", max_tokens=0)
