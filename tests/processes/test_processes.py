"""A server of several processes: front ends that share a port, engines that can be lost."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from openai import AsyncOpenAI

from bdh_batch.http.watch.response_types import RecordedSteps
from bdh_batch.processes.folder import RuntimeFolder
from tests.conftest import HANG_SECONDS, Cli, ServeFactory, Server, eventually
from tests.support import event_lines

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
HEARTBEAT = 6.0
LETTERS = {"allowed_token_ids": [*range(ord("a"), ord("z") + 1)]}  # so that a text has the tokens that were drawn
SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 60}}, "required": ["name"]}
BODIES: list[dict[str, Any]] = [
    {"seed": 1, "temperature": 1.2, "top_p": 0.9},
    {"seed": 2, "n": 2, "logprobs": 3, "presence_penalty": 0.5, "logit_bias": {"65": 2.0}},
    {"seed": 3, "echo": True, "logprobs": 1, "prompt": "What is said of it, the whole of it"},
    {"seed": 4, "stop": ["no such text", "\u00e9\u00e8"], "frequency_penalty": 0.3, "min_p": 0.01},
    {"seed": 5, "guided_json": SCHEMA, "logprobs": 0},
    {"seed": 6, "min_tokens": 30, "stop_token_ids": [65, 66, 67], "repetition_penalty": 1.1},
    {"seed": 7, "bad_words": ["a", "the"], "top_k": 40, "return_token_ids": True},
    {"temperature": 0, "prompt": ["one prompt", "another one"]},
]


@pytest.fixture(scope="module")
def pid_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run") / "server.pid"


@pytest.fixture(scope="module")
def several(serve: ServeFactory, pid_file: Path) -> Iterator[Server]:
    options = [f"engine.heartbeat_seconds={HEARTBEAT}", "server.workers=2", "engine.replicas=2", "engine.threads=1"]
    more = (f"server.pid_file={pid_file}", "telemetry.vllm_metrics=true")
    with serve(*options, *more, model=TINY, cutting=True) as server:
        until_ready(server)
        yield server


def engines(server: Server) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = server.http.get("/server_info").json()["engines"]
    return found


def facts_of(engine: Mapping[str, Any]) -> dict[str, Any]:
    return {name: engine[name] for name in ("pid", "model", "device", "state")}


def until_ready(server: Server) -> None:
    """Until whichever front end is asked knows two engines that compute."""

    def ready() -> bool:
        for _ in range(8):  # each on a connection of its own
            info = httpx.get(f"{server.url}/server_info", timeout=HANG_SECONDS)
            if info.status_code != 200 or [each["state"] for each in info.json()["engines"]] != ["ready", "ready"]:
                return False
        return True

    eventually(ready, what=lambda: server.log)


def children(supervisor: int, kind: str) -> list[int]:
    """Its processes of that kind, also those that it has from a launcher of its own."""
    found = []
    for pid in map(int, Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()):
        words = [*Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"), Path(f"/proc/{pid}/comm").read_bytes()]
        if any(word.startswith(f"{kind}-".encode()) for word in words):
            found.append(pid)
        elif b"tests.launcher" in words:
            found += children(pid, kind)
    return found


def completion(number: int, tokens: int) -> dict[str, Any]:
    body = BODIES[number % len(BODIES)]
    return {"prompt": f"prompt {number}", "max_tokens": tokens, **body}


def facts(content: Mapping[str, Any]) -> dict[str, Any]:
    """What does not differ from one request to the next. Logprobs of a prompt may be computed in other pieces."""
    usage = {name: content["usage"][name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"choices": content["choices"], "usage": usage}


async def whole(client: httpx.AsyncClient, body: Mapping[str, Any]) -> dict[str, Any]:
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return facts(response.json())


async def streamed(
    client: httpx.AsyncClient, body: Mapping[str, Any], begun: asyncio.Event | None = None
) -> dict[int, dict[str, Any]]:
    """Text, finish reason and logprobs of each choice. Sets `begun` with its first chunk."""
    choices: dict[int, dict[str, Any]] = {}
    async with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
        assert response.status_code == 200, await response.aread()
        async for line in event_lines(response):
            if not line.startswith("data: {"):
                continue
            if begun is not None:
                begun.set()
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                of = choices.setdefault(choice["index"], {"text": "", "tokens": [], "finish_reason": None})
                of["text"] += choice["text"]
                of["tokens"] += (choice.get("logprobs") or {}).get("tokens", [])
                of["finish_reason"] = choice["finish_reason"] or of["finish_reason"]
    return choices


def together(server: Server, some: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS, limits=limits) as client:
            return await some(client)

    return asyncio.run(run())


async def until_begun(begun: asyncio.Event, streams: Sequence[asyncio.Task[Any]]) -> None:
    """Until a stream has begun, or has failed."""
    waiting = asyncio.create_task(begun.wait())
    await asyncio.wait([waiting, *streams], return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()


def all_of(metrics: Mapping[str, float], name: str) -> list[float]:
    """The values of a metric, one of each process that has it."""
    return [value for each, value in metrics.items() if each.startswith(name)]


def test_any_front_end_has_all_responses(several: Server) -> None:
    """Each request comes on a connection of its own, so to either of them."""

    def ask(method: str, path: str = "", **body: Any) -> dict[str, Any]:
        response = httpx.request(method, f"{several.url}/v1/responses{path}", json=body or None, timeout=HANG_SECONDS)
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    first = ask("POST", input="Who is there?", max_output_tokens=8)
    path = f"/{first['id']}"
    several.until(lambda metrics: max(all_of(metrics, "bdh_store_states")) >= 1)
    for _ in range(8):
        assert ask("GET", path) == first
        ask("POST", input="Speak!", previous_response_id=first["id"], max_output_tokens=2)
    for end in ("cancelled", "deleted"):
        endless = ask("POST", input="a", background=True, max_output_tokens=100_000, ignore_eos=True)
        path = f"/{endless['id']}"
        assert {ask("GET", path)["status"] for _ in range(8)} <= {"queued", "in_progress"}
        if end == "cancelled":
            assert [ask("POST", f"{path}/cancel")["status"] for _ in range(8)] == ["cancelled"] * 8
        else:
            assert ask("DELETE", path)["deleted"]
        several.until(lambda metrics: not any(all_of(metrics, "bdh_num_requests_running")))
    path = f"/{ask('POST', input='b', background=True, max_output_tokens=20)['id']}"
    eventually(lambda: ask("GET", path)["status"] not in ("queued", "in_progress"))

    def events_of() -> str:
        """Without comments. A front end that is late is one that is asked again."""
        found: list[httpx.Response] = []

        def is_answered() -> bool:
            url = f"{several.url}/v1/responses{path}?stream=true"
            found.append(httpx.get(url, timeout=HANG_SECONDS))
            return found[-1].status_code != 503

        eventually(is_answered)
        assert found[-1].status_code == 200, found[-1].text
        return found[-1].text.replace(": keep-alive\n\n", "")

    (events,) = {events_of() for _ in range(8)}
    assert "response.created" in events
    assert events.endswith("data: [DONE]\n\n")


def test_turns_back_to_back_compute_nothing_again(several: Server) -> None:
    """Whichever front end takes them, and whichever engine computes them."""
    before, length = None, 0
    for number in range(16):
        body = {"input": f"Speak {number}!", "previous_response_id": before, "max_output_tokens": 8, **LETTERS}
        response = httpx.post(f"{several.url}/v1/responses", json=body, timeout=HANG_SECONDS).json()
        usage = response["usage"]
        if before is not None:  # the last token of the turn before was drawn, and has not been read yet
            computed = usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"]
            # A turn waits for a state for so long only, and the machine may be busy: then all is computed.
            assert computed in (usage["input_tokens"] - length + 1, usage["input_tokens"])
        before, length = response["id"], usage["total_tokens"]


class TestResponses:
    def test_are_those_of_a_server_of_one_process(self, several: Server, tiny: Server) -> None:
        async def all_of(client: httpx.AsyncClient) -> list[dict[str, Any]]:
            return await asyncio.gather(*(whole(client, completion(number, 40)) for number in range(16)))

        assert together(several, all_of) == together(tiny, all_of)

    def test_are_those_of_every_endpoint(self, several: Server, tiny: Server) -> None:
        for path, body in {
            "/tokenize": {"prompt": "some text"},
            "/detokenize": {"tokens": [65, 66]},
            "/v1/embeddings": {"input": ["a text", "another"]},
        }.items():
            assert several.http.post(path, json=body).json() == tiny.http.post(path, json=body).json() | (
                {"model": several.http.get("/v1/models").json()["data"][0]["id"]} if "embeddings" in path else {}
            )
        assert several.refusal({"prompt": "a", "stop_token_ids": [999]})["param"] == "stop_token_ids[0]"
        assert several.refusal({"prompt": "a", "max_tokens": 5, "guided_regex": "("})["param"] == "guided_regex"

    async def test_reach_the_official_client(self, several: Server) -> None:
        async with AsyncOpenAI(base_url=f"{several.url}/v1", api_key="none", timeout=HANG_SECONDS) as client:
            stream = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": "hello"}], max_tokens=12, seed=1, stream=True
            )
            said = [chunk.choices[0].delta.content or "" async for chunk in stream]
        assert any(said)

    def test_metrics_are_of_all_processes(self, several: Server) -> None:
        several.complete(prompt="a", max_tokens=5)
        metrics = several.metrics()
        generated = {name: value for name, value in metrics.items() if name.startswith("bdh_generation_tokens_total")}
        assert len(generated) == sum("engine" in name for name in generated) == 2
        assert sum(generated.values()) >= 5
        answered = {name for name in metrics if name.startswith("bdh_http_requests_in_flight")}
        assert answered == {f"bdh_http_requests_in_flight{{process=front-{number}}}" for number in range(2)}

    def test_under_vllms_names_all_engines_have_one_sample(self, several: Server) -> None:
        names = {"vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc"}
        with contextlib.closing(several.raw({"prompt": "a", "max_tokens": 100_000, "stream": True})) as stream:
            stream.read_until(b"data: ")
            several.until(lambda metrics: metrics["vllm:num_requests_running"] == 1)
            metrics = several.metrics()
        assert {name for name in metrics if name.startswith("vllm:")} == names  # without a process
        slots = sum(all_of(metrics, "bdh_state_slots_usage_perc")) / 2
        assert metrics["vllm:kv_cache_usage_perc"] == pytest.approx(slots)
        several.until(lambda metrics: metrics["vllm:num_requests_running"] == 0)


def test_operators_watch_all_processes(several: Server) -> None:
    """Whichever front end is asked: samples are of all, and steps of each engine."""

    async def events(client: httpx.AsyncClient, kind: str) -> AsyncGenerator[Any, None]:
        name = ""
        async with client.stream("GET", "/watch/stream") as response:
            async for line in response.aiter_lines():
                field, _, value = line.partition(": ")
                if field == "data" and name == kind:
                    yield json.loads(value)
                name = value

    async def watch(client: httpx.AsyncClient) -> None:
        async with contextlib.aclosing(events(client, "details")) as details:
            async for shown in details:  # the server is ready before all of its engines are
                if [engine["state"] for engine in shown["engines"]] == ["ready", "ready"]:
                    break
        endless = {"prompt": "a", "max_tokens": 100_000, "ignore_eos": True}
        streams = [asyncio.create_task(streamed(client, endless)) for _ in range(4)]
        metrics = await asyncio.to_thread(several.metrics)
        for _ in range(4):  # on connections of their own
            async with contextlib.aclosing(events(client, "sample")) as samples:
                async for sample in samples:
                    if sample["running"] == 4 and sample["generated"] > 0:
                        break
            assert sample["slots"] == sum(all_of(metrics, "bdh_state_slots{"))
        for _ in range(4):
            response = await client.get("/watch/steps", params={"steps": 2, "seconds": 10})
            found = RecordedSteps.model_validate_json(response.content)
            assert {engine.process: len(engine.steps) for engine in found.engines} == {"engine-0-0": 2, "engine-1-0": 2}
        for stream in streams:
            stream.cancel()
        await asyncio.gather(*streams, return_exceptions=True)

    together(several, watch)


class TestLosses:
    def undisturbed(self, server: Server, count: int, tokens: int) -> Any:
        async def all_of(client: httpx.AsyncClient) -> Any:
            return await asyncio.gather(*(streamed(client, completion(number, tokens)) for number in range(count)))

        return together(server, all_of)

    def disturbed(self, server: Server, count: int, tokens: int, disturb: Callable[[], None]) -> Any:
        async def all_of(client: httpx.AsyncClient) -> Any:
            begun = asyncio.Event()
            bodies = [completion(number, tokens) for number in range(count)]
            streams = [asyncio.create_task(streamed(client, body, begun)) for body in bodies]
            await until_begun(begun, streams)
            await asyncio.to_thread(disturb)
            return await asyncio.gather(*streams)

        return together(server, all_of)

    def test_of_engines_change_no_byte(self, several: Server) -> None:
        expected = self.undisturbed(several, 16, 150)
        logged = len(several.log)
        for number in range(20):

            def kill(number: int = number) -> None:
                os.kill(engines(several)[number % 2]["pid"], signal.SIGKILL)

            assert self.disturbed(several, 16, 150, kill) == expected
            until_ready(several)
            if number and "is resumed on another engine" in several.log[logged:]:
                break  # else all were killed too late
        else:
            raise AssertionError("no engine was killed in the midst of a stream")
        counts = {name: value for name, value in several.metrics().items() if name.startswith("bdh_failovers_total")}
        assert sum(value for name, value in counts.items() if "reason=lost" in name) >= 1
        assert sum(value for name, value in counts.items() if "reason=replaced" in name) == 0

    def test_of_an_engine_that_hangs_change_no_byte(self, several: Server) -> None:
        until_ready(several)
        expected = self.undisturbed(several, 8, 150)
        known = facts_of(engines(several)[0])
        hung = known["pid"]
        assert known == {"pid": hung, "model": "tiny", "device": "cpu", "state": "ready"}
        try:
            assert self.disturbed(several, 8, 150, lambda: os.kill(hung, signal.SIGSTOP)) == expected
            eventually(lambda: known | {"state": "connecting"} in [facts_of(each) for each in engines(several)])
        finally:
            os.kill(hung, signal.SIGCONT)
        until_ready(several)
        [name] = [each["name"] for each in engines(several) if each["pid"] == hung]  # it is back, and does no harm
        before = (folder := RuntimeFolder(_folder(hung))).last_beat(name)
        eventually(lambda: folder.last_beat(name) != before)  # else its supervisor would kill it
        assert self.undisturbed(several, 8, 150) == expected

    def test_of_a_front_end_are_noticed_by_its_own_clients_alone(self, several: Server) -> None:
        until_ready(several)
        victims = children(several.process.pid, "front")

        async def one(client: httpx.AsyncClient, begun: asyncio.Event) -> Any:
            try:
                return await streamed(client, completion(0, 400), begun)
            except httpx.TransportError:
                return None

        async def all_of(client: httpx.AsyncClient) -> Any:
            begun = asyncio.Event()
            streams = [asyncio.create_task(one(client, begun)) for _ in range(12)]
            await until_begun(begun, streams)
            os.kill(victims[0], signal.SIGKILL)
            return await asyncio.gather(*streams)

        found = together(several, all_of)
        survivors = [each for each in found if each is not None]
        assert all(each == survivors[0] for each in survivors)
        # The one that is started again accepts nobody until it has its model: nobody is told to wait for it.
        statuses: list[int] = []

        def is_back() -> bool:
            statuses.append(httpx.get(f"{several.url}/readyz", timeout=HANG_SECONDS).status_code)
            return len(re.findall(r"the process front-\d is ready", several.log)) == 3

        eventually(is_back, what=lambda: several.log)
        assert set(statuses) == {200}
        until_ready(several)
        several.until(lambda m: not any(v for k, v in m.items() if k.startswith("bdh_num_requests_running")))

    def test_reload_fails_no_request(self, several: Server, cli: Cli, pid_file: Path) -> None:
        until_ready(several)
        expected = self.undisturbed(several, 12, 200)
        before = {each["pid"] for each in engines(several)}

        def reload() -> None:
            done = cli("reload", "--pid-file", pid_file)
            assert done.returncode == 0, done.stderr

        assert self.disturbed(several, 12, 200, reload) == expected
        until_ready(several)
        assert before.isdisjoint({each["pid"] for each in engines(several)})


def test_one_pid_file_is_of_one_server(several: Server, cli: Cli, pid_file: Path) -> None:
    assert int(pid_file.read_text().splitlines()[0]) == several.process.pid
    options = ["--set", "engine.replicas=1", "--set", f"server.pid_file={pid_file}", "--model", TINY]
    done = cli("serve", "--port", 0, *options)
    assert done.returncode == 2
    assert "another server" in done.stderr


class TestEnd:
    """The last class here: the server that the others share ends."""

    def test_comes_with_its_drain_and_leaves_nothing(self, several: Server) -> None:
        until_ready(several)
        pids = [*children(several.process.pid, "engine"), *children(several.process.pid, "front")]
        assert len(pids) == 4
        folder = _folder(pids[0])
        stream = several.raw({"prompt": "a", "max_tokens": 200, "stream": True})
        stream.read_until(b"data: ")
        several.terminate()
        assert stream.read_all().rstrip().endswith(b"[DONE]\n\n\r\n0") or b"[DONE]" in stream.received
        assert several.exit_code() == 0
        stream.close()
        assert not any(lives(pid) for pid in pids)
        assert not folder.exists()


def lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _folder(engine: int) -> Path:
    """Where an engine listens: the folder of its model's sockets."""
    held = set()
    for each in Path(f"/proc/{engine}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # it was closed meanwhile
            held.add(os.readlink(each))
    sockets = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()[1:]]
    [folder] = {Path(words[7]).parent for words in sockets if len(words) > 7 and f"socket:[{words[6]}]" in held}
    return folder
