"""`bdh-batch plan`: arithmetic that can be done by hand, what more of anything must not do, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given, strategies as st

from bdh_batch.backends.wire import Gain, Gains, Start, frame
from bdh_batch.checkpoint.config import BDHConfig
from bdh_batch.cli import PLANNED, main
from bdh_batch.errors import ConfigError
from bdh_batch.messages import Delta, GenerationRequest, Origin, Prompt
from bdh_batch.plan.costs import Load, costs_of
from bdh_batch.plan.fleet import (
    FRAMES,
    PROMPT_BYTES,
    RETURNED_BYTES,
    SHORT_OF,
    Faults,
    Need,
    size_fleet,
    spares_for,
)
from bdh_batch.plan.machines import DATASHEETS, Machine, measured
from bdh_batch.plan.sizing import PLANNING, Planner, Sizing
from bdh_batch.settings import Settings

ROOT = Path(__file__).parent.parent
BUNDLED = ROOT / "models" / "bdh-shakespeare"
RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-2-threads"
UPSTREAM = BDHConfig()
SMALL = BDHConfig(n_layer=2, n_embd=8, n_head=2, mlp_internal_dim_multiplier=4, vocab_size=16)  # L · n · D = 512
MACHINE = Machine(
    name="hand",
    basis="made up",
    memory=100_000,
    bandwidth=1e6,
    flops_16=1e9,
    flops_32=1e7,
    vector_flops=1e12,
    host_link=2048.0,
    step_seconds=0.002,
    bandwidth_share=0.5,
    compute_share=0.1,
)


def test_the_costs_of_a_small_model_by_hand() -> None:
    costs = costs_of(SMALL, Load(active_fraction=0.5, dtype="float32"), skips_gates=False)
    assert costs.state_bytes == 512 * 4
    assert costs.weight_bytes == 4 * (3 * 256 + 2 * 16 * 8)
    assert costs.weight_traffic == 4 * (3 * 512 + 16 * 8)
    assert costs.state_traffic == 2 * 4 * 0.75 * 512  # read and written; of two neurons, one of which fires at 1/2, 3/4
    assert costs.state_flops == 4 * 0.75 * 512
    assert costs.product_flops == 2 * (3 * 512 + 16 * 8)
    assert costs.prompt_traffic == 2 * 4 * 512 / 256
    assert costs.prompt_flops == 2 * 3 * 512 + 4 * 512
    windowed = costs_of(SMALL, Load(active_fraction=0.5, state_dtype="bfloat16", window=64), skips_gates=True)
    assert windowed.state_bytes == 2 * 512 * 2
    assert windowed.state_traffic == 2 * 2 * 0.75 * 512 + 4 * 2 * 512 / 32
    assert windowed.product_flops == 2 * (1.75 * 512 + 16 * 8)
    assert windowed.prompt_flops == 2 * 1.75 * 512 + 4 * 0.75 * 512


def test_the_defaults_are_those_that_help_shows_and_the_server_has() -> None:
    for name, (reported, _) in PLANNED.items():
        field = name.replace("-", "_")
        default = getattr(Faults() if field in Faults.names() else Load(), field)
        assert name == "window" or reported.split(",")[0] == (default if isinstance(default, str) else f"{default:g}")
    served = Settings()
    assert (Load().dtype, Load().state_dtype) == (served.model.dtype, served.engine.state_dtype)
    assert Faults().detect_seconds == served.engine.heartbeat_seconds


def test_a_plan_by_hand() -> None:
    load = Load(streams=40, rate=2.0, prompt_tokens=8, answer_tokens=16, active_fraction=0.5, dtype="float32")
    found = Planner(SMALL, MACHINE, load).size()
    assert found.limits["state memory"] == 41  # (90,000 − 4,096) / 2,048
    # In a second, a stream has two tokens, of 3,072 bytes at 500,000 a second and 3,328 operations at a million each,
    # is planned twice, and has a prompt's token of 5,120 operations; beside all of them are two steps' fixed parts.
    # The weights come while the products are made.
    each, fixed = 2 * (3072 / 5e5 + 3328 / 1e6 + PLANNING) + 5120 / 1e6, 2 * 0.002
    assert found.limits["time"] == int((0.8 - fixed) / each) == 33
    assert (found.machines, found.streams_per_machine, found.most_streams_per_machine) == (2, 20, 33)
    assert found.binds == "state bandwidth"
    assert found.shares_of_time == pytest.approx(
        {
            "state bandwidth": 40 * 3072 / 5e5,
            "compute": 40 * 3328 / 1e6 + 20 * 5120 / 1e6,
            "steps": 0.004 + 40 * PLANNING,
        }
    )
    step = 20 * (3072 / 5e5 + 3328 / 1e6 + PLANNING) + 0.002
    assert found.step_seconds == pytest.approx(step)
    assert found.gap_seconds == pytest.approx(step + 20 * 0.5 * 5120 / 1e6)
    assert found.first_token_seconds == pytest.approx(step + 8 * 5120 / 1e6 / (1 - 20 * each - fixed))
    assert (found.tokens_per_s, found.prompt_tokens_per_s, found.suspend_seconds) == (80.0, 40.0, 1.0)


def test_a_dense_state_of_upstreams_config_bounds_an_h200_at_24_thousand_tokens() -> None:
    load = Load(state_dtype="bfloat16", active_fraction=1.0)
    traffic = costs_of(UPSTREAM, load, skips_gates=False).state_traffic
    assert DATASHEETS["h200"].bandwidth / traffic == pytest.approx(24_000, rel=0.01)


@pytest.mark.parametrize(
    ("changes", "binds"),
    [
        ({"memory": 30_000}, "state memory"),
        ({"bandwidth": 1e5}, "state bandwidth"),
        ({"flops_32": 1e6}, "compute"),
        ({"step_seconds": 0.7}, "steps"),
        ({"bandwidth": 2.5e4, "flops_32": 1e9}, "weights bandwidth"),
    ],
)
def test_what_there_is_least_of_binds(changes: dict[str, Any], binds: str) -> None:
    load = Load(streams=10, prompt_tokens=0, active_fraction=0.01, dtype="float32")
    if binds.startswith("state"):
        load = replace(load, active_fraction=0.5)
    machine = replace(MACHINE, **{"memory": 1e9, **changes})
    assert Planner(SMALL, machine, load).size().binds == binds


def test_one_ingress_process_writes_no_more_than_it_can() -> None:
    fast = replace(DATASHEETS["h200"], memory=1e15, bandwidth=1e18, step_seconds=0.0)
    found = Planner(SMALL, fast, Load(streams=1000, rate=1000.0)).size()
    writing = 1000 * 1000 / (0.8 * FRAMES)
    assert 10 < writing < 11
    assert found.fleet.ingress_processes == 11 + (found.fleet.replicas > 1)
    with pytest.raises(ConfigError, match="a stream alone on h200 gets at most 98,400 tokens/s"):
        Planner(SMALL, fast, Load(rate=100_000.0)).size()


def test_a_fleet_by_hand() -> None:
    load = Load(streams=300, rate=2.0, prompt_tokens=100, answer_tokens=50)
    faults = Faults(failures_per_day=24.0, detect_seconds=10.0, restart_seconds=20.0, network_gbit=0.8, moved=0.25)
    need = Need(9, busy=0.5, step_seconds=0.01, prompt_token_seconds=0.002, state_bytes=10**6)
    found = size_fleet(load, faults, need)
    assert faults.unavailability == pytest.approx(720 / (86_400 + 720))
    assert (found.spares, found.replicas, found.ingress_processes) == (
        2,
        11,
        2,
    )
    assert (found.streams_lost, found.recomputed_tokens) == (28, 28 * 125)
    assert found.recompute_seconds == pytest.approx(7.0)
    assert found.catch_up_seconds == pytest.approx(7.0 / (10 * 0.5))
    # Three of them come to one other replica, which has half of its time for them.
    assert found.pause_seconds == pytest.approx(10.0 + 2 * 0.25 / 0.5 + 0.01)
    assert found.failures_per_day == 264.0
    assert found.recomputed_tokens_per_day == 264 * 3500
    assert found.recomputed_share == pytest.approx(24 * 7.0 / 86_400)
    assert found.state_bytes_per_s == pytest.approx(2 * 12 * 0.25 * 1e6)
    assert found.state_link_share == pytest.approx(3e6 / 11 / 1e8)
    assert found.move_seconds == pytest.approx(0.01)
    assert found.move_pays_from == 5
    lone = size_fleet(load, replace(faults, failures_per_day=0.01), replace(need, machines=1))
    assert (lone.replicas, lone.ingress_processes, lone.catch_up_seconds) == (1, 1, None)
    assert lone.pause_seconds == pytest.approx(30.0 + 150.5 * 0.25 + 0.01)


@given(machines=st.integers(1, 400), unavailability=st.floats(0.0, 0.4))
def test_spares_are_the_fewest_that_are_enough(machines: int, unavailability: float) -> None:
    def short(spares: int) -> float:
        """By adding up the chances of all that is enough."""
        n, p = machines + spares, unavailability
        return 1 - math.fsum(math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(spares + 1))

    spares = spares_for(machines, unavailability)
    assert short(spares) <= SHORT_OF + 1e-9
    assert spares == 0 or short(spares - 1) > SHORT_OF - 1e-9


def test_a_very_large_fleet_is_sized_at_once() -> None:
    assert spares_for(10**9, 0.01) == pytest.approx(10**9 / 99, rel=0.001)


def test_messages_between_ingress_and_engine_are_as_large_as_planned() -> None:
    assert len(frame(Gains([Gain(1234, 0, 0, Delta(" t", [117]))]))) == RETURNED_BYTES
    sizes = [
        len(frame(Start.of(1, GenerationRequest(Origin("id"), [Prompt([7] * length)], 8), [])))
        for length in (300, 1300)
    ]
    assert sizes[1] - sizes[0] == pytest.approx(1000 * PROMPT_BYTES, abs=8)


LOADS = st.builds(
    Load,
    streams=st.integers(1, 10**6),
    rate=st.floats(0.01, 60.0),
    prompt_tokens=st.integers(0, 10_000),
    answer_tokens=st.integers(1, 4096),
    utilization=st.floats(0.2, 0.95),
    active_fraction=st.floats(0.01, 1.0),
    state_dtype=st.just("bfloat16"),
    dtype=st.just("bfloat16"),
    window=st.sampled_from([0, 128, 2048]),
)
MORE: dict[str, Callable[[Any, float], Any]] = {
    "streams": lambda value, factor: int(value * factor),
    "rate": lambda value, factor: value * factor,
    "prompt_tokens": lambda value, factor: int(value * factor) + 1,
    "active_fraction": lambda value, factor: min(1.0, value * factor),
    "state_dtype": lambda value, factor: "float32",
    "answer_tokens": lambda value, factor: max(1, int(value / factor)),
    "utilization": lambda value, factor: value / factor,
}


def sized(load: Load, machine: Machine) -> Sizing | None:
    try:
        return Planner(UPSTREAM, machine, load).size()
    except ConfigError:
        return None


@given(
    load=LOADS, what=st.sampled_from(sorted(MORE)), factor=st.floats(1, 20), name=st.sampled_from(sorted(DATASHEETS))
)
def test_who_wants_more_never_needs_less(load: Load, what: str, factor: float, name: str) -> None:
    machine = DATASHEETS[name]
    found = sized(load, machine)
    assume(found is not None)
    assert found is not None
    each = found.streams_per_machine
    assert each <= found.most_streams_per_machine == min(found.limits.values())
    assert (found.machines - 1) * found.most_streams_per_machine < load.streams <= found.machines * each
    assert sum(found.shares_of_time.values()) <= load.utilization
    assert 0 < found.step_seconds <= found.gap_seconds <= load.utilization / load.rate * (1 + 1e-9)
    assert found.first_token_seconds >= found.step_seconds
    wanted = replace(load, **{what: MORE[what](getattr(load, what), factor)})
    more = sized(wanted, machine)
    assert more is None or more.machines >= found.machines


def test_a_step_of_the_measured_model_takes_as_long_as_it_was_measured_to() -> None:
    machine = measured(RESULTS, memory=8e9)
    engine = json.loads((RESULTS / "engine-cpu.json").read_text())
    load = Load(dtype="float32", window=engine["attention_window"])
    planner = Planner(BDHConfig.from_dict(engine["model"]), machine, load)
    for row in engine["batches"]:
        if row["batch"] >= 16:
            assert 1e3 * sum(planner.step(row["batch"]).values()) == pytest.approx(row["ms_per_step"], rel=0.15)


@pytest.mark.parametrize("gpu", [*DATASHEETS, "cpu"])
def test_a_plan_is_reported_as_text_and_as_json(gpu: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", str(BUNDLED), "--gpu", gpu, "--streams", "2000", "--rate", "20"]
    command += ["--results", str(RESULTS)] if gpu == "cpu" else []
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["load"]["window"] == 512  # as the bundled model asks for
    assert main([*command, "--window", "0", "--state-dtype", "bfloat16"]) == 0
    text = capsys.readouterr().out
    assert "2,000 streams at 20 tokens/s each" in text
    assert "on paper" in text
    assert "losing one, tokens" in text
    options = re.search(r"scheduler.max_running=(\d+) engine.state_memory=(\d+),", text)
    assert options is not None
    chosen = Settings.model_validate({"scheduler": {"max_running": options[1]}, "engine": {"state_memory": options[2]}})
    assert chosen.engine.state_memory == 6 * 2**20 * chosen.scheduler.max_running
    assert f"x {gpu}" in text
    assert "state of a stream           6.0 MiB" in text
    assert found["state_bytes"] == 4 * 6 * 2**20


@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        ("--streams 0", "--streams 0: should be from 1 to"),
        ("--streams 1.5", "--streams 1.5: should be a whole number"),
        ("--rate nan", "--rate nan: should be at least"),
        ("--rate -1", "--rate -1.0: should be at least"),
        ("--rate fast", "--rate fast: should be a number"),
        ("--rate 1e5", "--rate 100000: a stream alone on l4 gets at most"),
        ("--answer-tokens 0", "--answer-tokens 0: should be from 1 to"),
        ("--prompt-tokens -1", "--prompt-tokens -1: should be from 0 to"),
        ("--utilization 1", "--utilization 1.0: should be above 0 and below 1"),
        ("--failures-per-day -1", "--failures-per-day -1.0: should be at least 0, and finite"),
        ("--failures-per-day 5000", "--failures-per-day 5000.0: should be so few that a replica is there more than"),
        ("--restart-seconds inf", "--restart-seconds inf: should be at least 0, and finite"),
        ("--network-gbit 0", "--network-gbit 0.0: should be above 0"),
        ("--moved 2", "--moved 2.0: should be from 0 to 1"),
        ("--moved much", "--moved much: should be a number"),
        ("--active-fraction 0", "--active-fraction 0.0: should be above 0, and at most 1"),
        ("--state-dtype int4", "--state-dtype int4: should be one of float32, bfloat16"),
        ("--dtype int4", "--dtype int4: should be one of"),
        ("--window 7", "--window 7: should be an even number"),
        ("--gpu b900", "--gpu b900: should be one of h200, h100, a100, l4, cpu"),
        ("--gpu cpu", "--gpu cpu: needs --results"),
        (f"--results {RESULTS}", "--results: is for --gpu cpu"),
        (f"--gpu cpu --results {ROOT}", "kernels-cpu.json cannot be read"),
        ("--model nowhere", "nowhere"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags: str, reported: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", str(BUNDLED), "--gpu", "l4", *flags.split()]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert reported in printed.err
    assert printed.err.count("\n") == 1


def test_a_rate_that_is_refused_is_reported_with_the_highest_that_is_not() -> None:
    load = Load(prompt_tokens=0, active_fraction=0.5, dtype="float32")
    with pytest.raises(ConfigError) as refused:
        Planner(SMALL, MACHINE, replace(load, rate=1000.0)).size()
    alone = 1 / (0.002 + PLANNING + 3072 / 5e5 + 6656 / 5e5)  # a single stream waits for the weights
    assert str(refused.value) == f"--rate 1000: a stream alone on hand gets at most {0.8 * alone:,.0f} tokens/s"
    assert Planner(SMALL, MACHINE, replace(load, rate=0.8 * alone * 0.999)).size().machines == 1


def test_a_model_too_large_for_a_machine_is_refused() -> None:
    huge = BDHConfig(n_layer=48, n_embd=4096, n_head=16)
    with pytest.raises(ConfigError, match=r"--gpu l4: weights and the state of one stream are .* more than 90% of it"):
        Planner(huge, DATASHEETS["l4"], Load()).size()


@pytest.mark.parametrize("engine", [{}, [], {"batches": [], "model": {}}, {"batches": [{"batch": 1}]}])
def test_results_that_are_none_are_refused(engine: object, tmp_path: Path) -> None:
    (tmp_path / "kernels-cpu.json").write_bytes((RESULTS / "kernels-cpu.json").read_bytes())
    (tmp_path / "engine-cpu.json").write_text(json.dumps(engine))
    with pytest.raises(ConfigError, match="not what the benchmarks write"):
        measured(tmp_path, 1e9)


def test_results_whose_products_alone_take_longer_than_the_steps_are_refused(tmp_path: Path) -> None:
    kernels, engine = (json.loads((RESULTS / f"{name}-cpu.json").read_text()) for name in ("kernels", "engine"))
    kernels["machine_rates"]["gemm_gflop_s"] /= 100
    for name, held in (("kernels", kernels), ("engine", engine)):
        (tmp_path / f"{name}-cpu.json").write_text(json.dumps(held))
    with pytest.raises(ConfigError, match="the products alone would take longer"):
        measured(tmp_path, 1e9)
