"""Several models in one server: two that work, of different vocabularies, and one that does not."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from bdh_batch.processes.supervised_models import LINGER_SECONDS
from tests.conftest import HANG_SECONDS, Cli, ServeFactory, Server, eventually
from tests.processes.test_processes import children, streamed, together, until_begun, whole

MODELS = Path(__file__).parent.parent / "data" / "conformance"
TINY, ODD = MODELS / "tiny", MODELS / "odd-sizes"
KEEP_ALIVE = 0.3  # seconds; a front end holds a model for another one after its last request
BODY: dict[str, Any] = {"max_tokens": 30, "seed": 5, "temperature": 0.9, "logprobs": 2}
PROMPTS = {"tiny": "some text", "odd": [3, 96, 14, 15]}


@pytest.fixture(scope="module")
def keys(cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The file of the keys, and the keys of an operator and of users."""
    file = tmp_path_factory.mktemp("keys") / "keys"
    rights = {"operator": ["--operator"], "user": [], "of_tiny": ["--models", "tiny"], "of_odd": ["--models", "odd"]}
    made = {name: cli("keys", "add", "--file", file, "--name", name, *more) for name, more in rights.items()}
    return {name: done.stdout.strip() for name, done in made.items()} | {"file": str(file)}


@pytest.fixture(scope="module")
def models(serve: ServeFactory, keys: dict[str, str]) -> Iterator[Server]:
    entries = (
        f"[{{id: tiny, path: {TINY}, aliases: [small]}}, "
        f"{{id: odd, path: {ODD}, load: on_demand, keep_alive: {KEEP_ALIVE}, max_model_len: 50000}}, "
        "{id: broken, path: /nowhere, load: on_demand}, {id: damaged, path: /dev/null}]"
    )
    options = [f"models={entries}", "auth.enabled=true", f"auth.api_keys_file={keys['file']}", "server.workers=2"]
    with serve(*options, cutting=True) as server:
        server.http.headers["authorization"] = f"Bearer {keys['operator']}"
        yield server


def states(server: Server) -> dict[str, str]:
    return {each["id"]: each["status"]["value"] for each in server.http.get("/v1/models").json()["data"]}


def until(server: Server, name: str, state: str) -> None:
    eventually(lambda: states(server)[name] == state, HANG_SECONDS, lambda: server.log)


def engines_of(server: Server, key: str, name: str) -> list[Any]:
    """The engine processes of a model that whichever front end is asked knows."""
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=HANG_SECONDS) as client:
        return [each for each in client.get("/server_info").json().get("engines", []) if each.get("model") == name]


def as_user(server: Server, key: str, path: str, body: dict[str, Any]) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"}
    return httpx.post(f"{server.url}{path}", json=body, headers=headers, timeout=HANG_SECONDS)


def test_one_that_cannot_be_loaded_harms_no_other(models: Server) -> None:
    """The first test here: what fails is tried again now and then, each time by a process that imports torch."""
    until(models, "damaged", "failed")
    for name in ("broken", "damaged"):
        error = models.refusal({"model": name, "prompt": "a"}, status=503)
        assert error["message"] == f"The model {name} could not be loaded. The server's log has the reason."
    assert states(models)["broken"] == "failed"
    assert models.http.get("/readyz").status_code == 200
    assert "there is no model at /nowhere" in models.log
    models.complete(model="tiny", prompt="a", max_tokens=2)
    # An operator gives it up; else a process would be started for it again and again, to the end of these tests.
    assert models.http.post("/models/unload", json={"model": "damaged"}).json() == {"success": True}
    assert states(models)["damaged"] == "unloaded"


def test_both_answer_at_once_as_each_does_alone(models: Server, odd: Server, tiny: Server) -> None:
    async def alone(client: httpx.AsyncClient, name: str) -> Any:
        return [await each(client, BODY | {"prompt": PROMPTS[name]}) for each in (whole, streamed)]

    expected = {name: together(server, partial(alone, name=name)) for name, server in (("odd", odd), ("tiny", tiny))}

    async def mixed(client: httpx.AsyncClient) -> list[tuple[str, Any]]:
        client.headers = models.http.headers

        async def one(name: str) -> tuple[str, Any]:
            body = BODY | {"model": name, "prompt": PROMPTS[name]}
            return name, [await each(client, body) for each in (whole, streamed)]

        return await asyncio.gather(*(one(name) for _ in range(12) for name in ("tiny", "odd")))

    for name, found in together(models, mixed):
        assert found == expected[name], name
    for name in ("tiny", "odd"):
        generated = [
            sample
            for family in _metrics(models)
            for sample in family.samples
            if sample.name == "bdh_generation_tokens_total" and sample.labels["model_name"] == name
        ]
        assert sum(sample.value for sample in generated) >= 12 * 60


def test_what_is_said_of_each_is_its_own(models: Server) -> None:
    card = models.http.get("/v1/models/small").json()
    assert (card["root"], card["max_model_len"], card["status"]) == ("tiny", 131072, {"value": "loaded"})
    odd = models.http.get("/v1/models/odd").json()
    assert odd["max_model_len"] == 50_000
    assert card["fingerprint"] != odd["fingerprint"]
    assert models.http.get("/tokenizer_info?model=odd").json()["vocab_size"] == 97
    assert models.http.get("/tokenizer_info").json()["vocab_size"] == 256
    assert models.refusal({"model": "odd", "prompt": "no tokenizer"})["param"] == "prompt"
    assert models.refusal({"model": "odd", "prompt": [97]})["param"] == "prompt"
    assert models.refusal({"model": "odd", "prompt": [1], "max_tokens": 50_001})["code"] == "context_length_exceeded"
    assert models.complete(prompt="none is named: the first", max_tokens=1)["model"] == "tiny"
    assert "'small'" in models.refusal({"model": "other", "prompt": "a"}, status=404)["message"]


def test_one_on_demand_is_loaded_for_a_request_and_unloaded_when_idle(models: Server) -> None:
    sockets: set[int] = set()
    for _ in range(2):
        until(models, "odd", "unloaded")
        assert models.complete(model="odd", prompt=[1, 2], max_tokens=3)["usage"]["completion_tokens"] == 3
        sockets.add(_descriptors(models))
    until(models, "odd", "unloaded")
    eventually(lambda: _descriptors(models) <= min(sockets), HANG_SECONDS, lambda: (sockets, _descriptors(models)))


def test_one_is_not_unloaded_under_a_stream(models: Server) -> None:
    until(models, "odd", "unloaded")
    body = {"model": "odd", "prompt": [1], "max_tokens": 40_000, "stream": True, "return_token_ids": True}
    with models.http.stream("POST", "/v1/completions", json=body) as stream:
        next(stream.iter_lines())
        begun = time.monotonic()
        while time.monotonic() < begun + 2 * (KEEP_ALIVE + LINGER_SECONDS):
            state = states(models)["odd"]
            if not running(models, "odd"):
                break  # the test was so late that it has ended
            assert state == "loaded"
    until(models, "odd", "unloaded")


def test_operators_load_and_unload(models: Server, keys: dict[str, str]) -> None:
    for path in ("/models/load", "/models/unload"):
        error = models.error(as_user(models, keys["user"], path, {"model": "tiny"}), 403)
        assert error["param"] == "model"
        assert models.refusal({"model": "none"}, path, 404)["code"] == "model_not_found"
        assert models.refusal({}, path)["param"] == "model"
    assert models.http.post("/models/unload", json={"model": "tiny"}).json() == {"success": True}
    assert states(models)["tiny"] == "unloaded"
    assert "has been unloaded" in models.refusal({"model": "tiny", "prompt": "a"}, status=503)["message"]
    assert "is not loaded" in models.refusal({"model": "tiny"}, "/models/unload")["message"]
    assert models.http.post("/models/load", json={"model": "small"}).json() == {"success": True}
    models.complete(model="tiny", prompt="a", max_tokens=2)
    until(models, "odd", "unloaded")
    assert models.http.post("/models/load", json={"model": "odd"}).json() == {"success": True}
    assert states(models)["odd"] in ("loaded", "unloading", "unloaded")  # it has been idle since
    assert engines_of(models, keys["user"], "tiny") == []
    eventually(lambda: [each["state"] for each in engines_of(models, keys["operator"], "tiny")] == ["ready"])
    found = {
        (sample.name, sample.labels["model_name"], sample.labels.get("state")): sample.value
        for family in _metrics(models)
        for sample in family.samples
        if sample.name in ("bdh_model_loaded", "bdh_engines")
    }
    assert found["bdh_model_loaded", "tiny", None] == 1
    assert found["bdh_model_loaded", "damaged", None] == 0
    assert found["bdh_engines", "tiny", "ready"] == 1


def test_keys_have_rights_by_model(models: Server, keys: dict[str, str]) -> None:
    models.error(as_user(models, keys["of_tiny"], "/v1/completions", {"model": "odd", "prompt": [1]}), 403)
    headers = {"authorization": f"Bearer {keys['of_odd']}"}
    listed = httpx.get(f"{models.url}/v1/models", headers=headers, timeout=HANG_SECONDS).json()["data"]
    assert [each["id"] for each in listed] == ["odd"]
    own = as_user(models, keys["of_odd"], "/v1/completions", {"prompt": [1], "max_tokens": 1})
    assert own.json()["model"] == "odd"  # the first one that it may use


def test_an_engine_that_is_killed_is_that_of_one_model(models: Server, keys: dict[str, str]) -> None:
    async def disturbed(client: httpx.AsyncClient) -> Any:
        client.headers = models.http.headers
        body = {"prompt": "a", "max_tokens": 1000, "seed": 1}
        [engine] = engines_of(models, keys["operator"], "tiny")
        begun = [asyncio.Event() for _ in range(4)]
        streams = [asyncio.create_task(streamed(client, body, each)) for each in begun]
        others = [
            asyncio.create_task(streamed(client, {"model": "odd", "prompt": [1], "max_tokens": 300})) for _ in range(4)
        ]
        for each, stream in zip(begun, streams, strict=True):  # before, they would be refused: no engine is left
            await until_begun(each, [stream])
        os.kill(engine["pid"], signal.SIGKILL)
        return await asyncio.gather(*streams), await asyncio.gather(*others)

    texts, others = together(models, disturbed)
    assert all(each == texts[0] for each in texts)
    assert all(each[0]["finish_reason"] == "length" for each in others)


def running(server: Server, name: str) -> bool:
    """Whether a model's engines run something."""
    samples = [sample for family in _metrics(server) for sample in family.samples]
    return any(
        sample.name == "bdh_num_requests_running" and sample.labels["model_name"] == name and sample.value
        for sample in samples
    )


def _metrics(server: Server) -> Any:
    return [*text_string_to_metric_families(server.http.get("/metrics").text)]


def _descriptors(server: Server) -> int:
    """Open files of the supervisor and its front ends."""
    pids = [server.process.pid, *children(server.process.pid, "front")]
    return sum(len([*Path(f"/proc/{pid}/fd").iterdir()]) for pid in pids)
