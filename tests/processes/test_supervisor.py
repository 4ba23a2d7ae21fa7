"""What a supervisor gives its children."""

from __future__ import annotations

import subprocess
import sys

import pytest

from bdh_batch.errors import ConfigError
from bdh_batch.processes import placement
from bdh_batch.processes.children import Backoff, Role, environment
from bdh_batch.processes.model_settings import models_of
from bdh_batch.processes.placement import FreeCores, engine_roles
from bdh_batch.processes.supervisor import check
from bdh_batch.settings import load


@pytest.mark.parametrize(
    ("visible", "device", "expected"),
    [
        ("", "cuda:1", "1"),
        ("4,5", "cuda:1", "5"),
        ("GPU-a, GPU-b", "cuda:0", "GPU-a"),
        ("4,5", "cuda", "4,5"),
        ("4,5", "cpu", "4,5"),
        ("4,5", "", "4,5"),
    ],
)
def test_an_engine_sees_its_own_gpu_of_those_that_the_server_sees(
    monkeypatch: pytest.MonkeyPatch, visible: str, device: str, expected: str
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert environment(Role("engine", 0, device=device))["CUDA_VISIBLE_DEVICES"] == expected


class TestBackoff:
    @pytest.fixture(autouse=True)
    def clock(self) -> None:
        self.now = 0.0
        self.backoff = Backoff(lambda: self.now)

    def end(self, starting: float, serving: float | None) -> float:
        """Starts a process, which ends after so many seconds of each; None is one that does not get ready."""
        self.now += starting
        if serving is not None:
            self.backoff.ready()
            self.now += serving
        return self.backoff.ended()

    def test_one_that_has_served_comes_back_at_once_however_often_it_is_killed(self) -> None:
        assert {self.end(starting=2, serving=1 + number % 3) for number in range(50)} == {0.0}

    def test_one_that_cannot_start_waits_longer_each_time(self) -> None:
        assert [self.end(starting=3, serving=None) for _ in range(9)] == [0.5, 1, 2, 4, 8, 16, 30, 30, 30]

    def test_one_that_ends_at_the_first_thing_that_it_does_waits_as_well(self) -> None:
        assert [self.end(starting=3, serving=0.5) for _ in range(4)] == [0.5, 1, 2, 4]

    def test_what_has_served_has_its_failed_starts_forgotten(self) -> None:
        assert [self.end(3, serving) for serving in (None, None, 60, None, 0.1)] == [0.5, 1, 0, 0.5, 1]


def roles(*overrides: tuple[str, object]) -> list[list[Role]]:
    chosen = load(overrides=[("model.device", "cpu"), *overrides]).settings
    return engine_roles(models_of(chosen), chosen.server.max_loaded_models)


def test_there_is_an_engine_for_each_device_or_replica() -> None:
    def devices(*overrides: tuple[str, object]) -> list[list[str]]:
        return [[role.device for role in each] for each in roles(*overrides)]

    assert devices(("engine.replicas", "3")) == [["", "", ""]]
    assert devices(("engine.devices", "cuda:0,cuda:1")) == [["cuda:0", "cuda:1"]]
    assert devices(("server.workers", "2")) == [[""]]
    assert devices(("models", "[{id: a, replicas: 2}, {id: b}]")) == [["", ""], [""]]
    assert [role.number for each in roles(("models", "[{id: a, replicas: 2}, {id: b}]")) for role in each] == [0, 1, 2]


class TestCores:
    @pytest.fixture(autouse=True)
    def eight(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "usable_cores", lambda: 8)
        monkeypatch.setattr(placement, "cores", lambda: range(8))

    def test_an_engine_has_some_that_fewest_others_have(self) -> None:
        free = FreeCores()
        first, second, third = free.take(3), free.take(3), free.take(3)
        assert (first, second, third) == ((0, 1, 2), (3, 4, 5), (0, 6, 7))
        free.give_back(second)
        assert free.take(2) == (3, 4)
        assert (free.take(None), free.take(8)) == ((), ())

    def test_a_quota_of_time_is_no_choice_of_cores(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(placement, "usable_cores", lambda: 2)
        assert FreeCores().take(1) == ()
        assert [role.threads for role in roles(("engine.replicas", "2"))[0]] == [1, 1]

    def test_one_engine_has_all_and_several_share_them(self) -> None:
        assert [role.threads for role in roles(("engine.replicas", "1"))[0]] == [None]
        assert [role.threads for role in roles(("engine.replicas", "2"))[0]] == [4, 4]
        assert {role.threads for role in roles(("engine.devices", "cuda:0,cuda:1"))[0]} == {None}

    def test_models_share_them_as_many_as_are_loaded_at_once(self) -> None:
        def threads(entries: str, *overrides: tuple[str, object]) -> list[int | None]:
            return [role.threads for each in roles(("models", entries), *overrides) for role in each]

        entries = "[{id: a}, {id: b, load: on_demand}, {id: c, load: on_demand, replicas: 2}]"
        assert threads(entries) == [2, 2, 2, 2]
        assert threads(entries, ("server.max_loaded_models", "2")) == [2, 2, 2, 2]
        assert threads("[{id: a, threads: 5}, {id: b}]") == [5, 3]
        one = "[{id: a, load: on_demand}, {id: b, load: on_demand}]"
        assert threads(one, ("server.max_loaded_models", "1")) == [None, None]

    def test_threads_that_are_asked_for_must_be_there(self) -> None:
        threads = ("engine.threads", "4")
        assert [role.threads for role in roles(("engine.replicas", "2"), threads)[0]] == [4, 4]
        with pytest.raises(ConfigError, match="have 12 in all, more than the 8 cores"):
            roles(("engine.replicas", "3"), threads)
        assert len(roles(("engine.replicas", "12"), ("engine.threads", "1"))[0]) == 12


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([("engine.replicas", "2"), ("engine.devices", "cuda:0")], "engine.replicas: 2, but engine.devices has 1"),
        (
            [("models", "[{id: a, replicas: 2, devices: [cpu]}]")],
            "models (a): replicas: 2, but models (a): devices has 1",
        ),
        ([("models", "[{id: a}]"), ("model.path", "x")], "model.path: leave it out"),
        ([("models", "[{id: a}]"), ("model.aliases", "x")], "model.aliases: leave it out"),
        ([("server.max_loaded_models", "1")], "server.max_loaded_models: there is one model only"),
        (
            [("models", "[{id: a}, {id: b, load: on_demand}]"), ("server.max_loaded_models", "1")],
            "server.max_loaded_models: 1, but 1 are loaded when the server starts",
        ),
        ([("models", "[{id: a, keep_alive: 3}]")], "models (a): keep_alive: a warm model stays loaded"),
        ([("models", "[{id: a, device: cpu, devices: [cpu]}]")], "models (a): device: devices says where"),
        (
            [("server.workers", "2"), ("rate_limiting.enabled", "true")],
            "rate_limiting.storage: each of several processes",
        ),
    ],
)
def test_options_that_do_not_fit_together_are_refused(overrides: list[tuple[str, object]], message: str) -> None:
    chosen = load(overrides=overrides).settings
    with pytest.raises(ConfigError) as caught:
        check(chosen, models_of(chosen))
    assert message in str(caught.value)


def test_a_model_of_several_has_what_its_entry_gives_and_else_what_all_have() -> None:
    entries = "[{id: a, path: x, dtype: bfloat16, state_memory: 1 MiB}, {id: b, load: on_demand, keep_alive: 3}]"
    overrides = [("models", entries), ("model.max_model_len", "7"), ("engine.state_memory", "2 MiB")]
    first, second = models_of(load(overrides=overrides).settings)
    assert (first.name, first.settings.model.dtype, first.settings.engine.state_memory) == ("a", "bfloat16", 2**20)
    assert (second.settings.model.dtype, second.settings.engine.state_memory) == ("float32", 2**21)
    assert first.settings.model.max_model_len == second.settings.model.max_model_len == 7
    assert (first.on_demand, second.on_demand, second.keep_alive) == (False, True, 3.0)


def test_only_a_process_that_computes_imports_torch() -> None:
    program = "import sys, bdh_batch.processes.front_end, bdh_batch.processes.supervisor; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=300)
    assert {"torch", "numba", "triton"}.isdisjoint(found.stdout.split())
