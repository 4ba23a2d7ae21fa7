"""Who is served when, and that none of it can be seen in a text."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from httpx import Response

from bdh_batch.http.auth.keys import KeyFile, new_key
from tests.conftest import eventually

if TYPE_CHECKING:
    from tests.conftest import RawStream, ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
ENDLESS = {"prompt": "a", "max_tokens": 100_000, "stream": True}
STEM = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 3
KEYS = ("flood", "drop")
ENDED = "bdh_request_success_total{finished_reason=length}"
TOTAL, CACHED = "bdh_prompt_tokens_total", "bdh_prompt_tokens_cached_total"


@pytest.fixture(scope="module")
def alone(serve: ServeFactory) -> Iterator[Server]:
    """Every request is computed by itself, from its first token on."""
    with serve("prefix_cache.enabled=false", model=TINY) as server:
        yield server


@pytest.fixture(scope="module")
def crowded(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Room for two on the device; eight take turns of three steps."""
    trace = tmp_path_factory.mktemp("trace") / "trace.jsonl"
    options = [
        *("scheduler.max_running=8", "scheduler.quantum_steps=3", f"engine.state_memory={2 * STATE}"),
        *(f"prefix_cache.host_memory={20 * STATE}", "scheduler.max_queued_tokens=4000"),
        "scheduler.top_priority=-5",
        f"scheduler.trace_file={trace}",
    ]
    with serve(*options, model=TINY) as server:
        yield server
    events = [json.loads(line) for line in trace.read_text().splitlines()]
    assert {event["event"] for event in events} == {"submit", "step", "end"}
    submits = [event for event in events if event["event"] == "submit"]
    assert all(event["arrived"] <= event["now"] for event in submits)
    submitted = [event["place"] for event in submits]
    assert submitted == sorted(event["place"] for event in events if event["event"] == "end")


def state_bytes() -> int:
    config = json.loads((TINY / "config.json").read_text())
    width = config["n_embd"]
    return int(4 * config["n_layer"] * config["mlp_internal_dim_multiplier"] * width * width)


STATE = state_bytes()


def ask(server: Server, **body: Any) -> dict[str, Any]:
    return server.complete(**({"max_tokens": 40, "seed": 7} | body))


def together(server: Server, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    with ThreadPoolExecutor(len(bodies)) as pool:
        return list(pool.map(lambda body: ask(server, **body), bodies))


def texts(responses: list[dict[str, Any]]) -> list[list[str]]:
    return [[choice["text"] for choice in response["choices"]] for response in responses]


def test_taking_turns_changes_no_text(crowded: Server, alone: Server) -> None:
    bodies = [{"prompt": f"{number}: {STEM[: 13 * number]}", "max_tokens": 60} for number in range(8)]
    endless = begun(crowded, 2)  # so that there is somebody to take turns with, however late the others come
    before = crowded.metrics()["bdh_num_preemptions_total"]
    responses = together(crowded, bodies)
    close(endless)
    assert texts(responses) == texts([ask(alone, **body) for body in bodies])
    assert crowded.metrics()["bdh_num_preemptions_total"] - before >= 8
    crowded.until_idle()
    assert crowded.metrics()["bdh_num_requests_swapped"] == 0


def test_more_streams_than_slots_all_keep_moving(crowded: Server) -> None:
    streams = begun(crowded, 8)
    metrics = crowded.metrics()
    assert (metrics["bdh_num_requests_running"], metrics["bdh_num_requests_swapped"]) == (2, 6)
    for stream in streams:
        already = len(stream.received)
        while len(stream.received) < already + 20_000:
            stream.received += stream.socket.recv(65536)
    close(streams)
    crowded.until_idle()


def test_a_higher_class_does_not_wait_for_a_lower(crowded: Server) -> None:
    streams = begun(crowded, 8, priority=5)
    before = crowded.metrics()
    ask(crowded, prompt="now", max_tokens=2, priority=-5)
    assert ended(crowded) == before.get(ENDED, 0) + 1, "it did not wait until a stream had ended"
    close(streams)
    crowded.until_idle()


def test_the_tokens_that_wait_are_bounded(crowded: Server) -> None:
    streams = begun(crowded, 8)
    waiting = crowded.raw({"prompt": "b" * 3000, "max_tokens": 1})
    crowded.until(lambda m: m["bdh_num_requests_waiting"] == 1)
    error = crowded.refusal({"prompt": "c" * 3000}, status=429)
    assert error["code"] == "queue_full"
    assert "tokens" in error["message"]
    close([waiting, *streams])
    crowded.until_idle()


def test_a_deadline_ends_what_waits_and_what_runs(crowded: Server) -> None:
    streams = begun(crowded, 8)
    headers = {"x-request-timeout": "0.2"}
    waiting = crowded.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
    assert waiting.status_code in (408, 429)  # refused at once where the wait is foreseen
    crowded.error(waiting, waiting.status_code)
    close(streams)
    crowded.until_idle()
    body = {"prompt": "a", "max_tokens": 100_000}
    ended = crowded.http.post("/v1/completions", json=body, headers=headers)
    assert ended.status_code in (408, 504)  # the former where others keep the cores, so that it never ran
    assert crowded.error(ended, ended.status_code)["code"]
    with crowded.http.stream("POST", "/v1/completions", json=body | {"stream": True}, headers=headers) as response:
        last = response.read().strip().split(b"\n\n")[-1]
    assert json.loads(last.removeprefix(b"data: "))["error"]["type"] == "timeout_error"
    crowded.until_idle()


@pytest.mark.parametrize("value", ["", "0", "-1", "nan", "inf", "soon", "86401", "1e400"])
def test_a_timeout_that_is_none_is_refused_by_name(tiny: Server, value: str) -> None:
    response = tiny.http.post("/v1/completions", json={"prompt": "a"}, headers={"x-request-timeout": value})
    assert tiny.error(response, 400)["param"] == "x-request-timeout"


@pytest.mark.parametrize("value", [1001, -1001, 0.5, "1", True])
def test_a_priority_out_of_range_is_refused_by_name(tiny: Server, value: object) -> None:
    assert tiny.refusal({"prompt": "a", "priority": value})["param"] == "priority"


def test_a_prompt_seen_before_begins_where_it_ended(alone: Server, tiny: Server) -> None:
    prompt = "seen before: " + STEM
    first, again = ask(tiny, prompt=prompt), ask(tiny, prompt=prompt)
    assert texts([first, again]) == texts([ask(alone, prompt=prompt)]) * 2
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1
    assert alone.metrics()[CACHED] == 0


def test_the_next_turn_begins_where_the_response_ended(alone: Server, tiny: Server) -> None:
    prompt = list(b"a conversation: " + STEM.encode())
    response = ask(tiny, prompt=prompt, return_token_ids=True)["choices"][0]["token_ids"]
    longer = prompt + response + list(b" and so?")
    second = ask(tiny, prompt=longer)
    cached = second["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == len(prompt) + len(response) - 1
    assert texts([second]) == texts([ask(alone, prompt=longer)])


@pytest.mark.parametrize("caching", [True, False])
def test_n_choices_are_prefilled_once(tiny: Server, alone: Server, caching: bool) -> None:
    prompt, server = "forked " + STEM, tiny if caching else alone
    before = server.metrics()[TOTAL]
    response = ask(server, prompt=prompt, n=6)
    assert server.metrics()[TOTAL] == before + len(prompt) + 5
    server.until_idle()
    assert (server.metrics()["bdh_prefix_cache_states"] > 0) == caching
    each = [ask(alone, prompt=prompt, seed=7 + number)["choices"][0]["text"] for number in range(6)]
    assert texts([response]) == [each]
    assert response["usage"]["prompt_tokens"] == len(prompt)


async def test_100_requests_with_one_prefix_hardly_compute_it_again(alone: Server, tiny: Server) -> None:
    prompts = [f"shared by all: {STEM}{chr(27 + number)} and so?" for number in range(100)]
    stem = len(prompts[0]) - len("* and so?")
    before = tiny.metrics()
    async with tiny.async_openai() as client, asyncio.timeout(300):
        responses = await asyncio.gather(
            *(client.completions.create(model="tiny", prompt=p, max_tokens=4, temperature=0) for p in prompts)
        )
    computed = tiny.metrics()[TOTAL] - before[TOTAL]
    # Twice where the first was through its prompt before the second came and showed where they part; and what differs.
    assert stem + 100 <= computed <= 2 * stem + 100 * len("* and so?")
    for number in (0, 57, 99):
        assert responses[number].choices[0].text == alone.text(prompt=prompts[number], max_tokens=4, temperature=0)


@pytest.fixture(scope="module")
def first_key(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A file with a key that has the right to go first, and that key."""
    path = tmp_path_factory.mktemp("keys") / "keys"
    return path, KeyFile(path).add(partial(new_key, name="first", rights={"top_priority": -1000}))


@pytest.fixture(scope="module")
def keyed(serve: ServeFactory, first_key: tuple[Path, str]) -> Iterator[Server]:
    options = ["auth.enabled=true", f"auth.api_keys={','.join(KEYS)}", "scheduler.max_running=4"]
    options += [f"auth.api_keys_file={first_key[0]}", "scheduler.priority_patience_seconds=1"]
    with serve(*options, "scheduler.quantum_steps=8", model=TINY) as server:
        yield server


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "max_tokens": 1}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
        ("/v1/embeddings", {"input": "a"}),
    ],
)
def test_nobody_goes_before_others_without_a_right_to_it(
    keyed: Server, tiny: Server, first_key: tuple[Path, str], path: str, body: dict[str, Any]
) -> None:
    error = tiny.refusal(body | {"priority": -1}, path, 403)
    assert (error["param"], error["code"]) == ("priority", "permission_denied")
    assert "scheduler.top_priority" in error["message"]
    assert tiny.http.post(path, json=body | {"priority": 1000}).status_code == 200
    for key, priority, status in ((KEYS[0], -1, 403), (KEYS[0], 0, 200), (first_key[1], -1000, 200)):
        headers = {"authorization": f"Bearer {key}"}
        response = keyed.http.post(path, json=body | {"priority": priority}, headers=headers)
        assert response.status_code == status, response.text


def test_a_key_that_goes_first_keeps_nobody_waiting_for_ever(keyed: Server, first_key: tuple[Path, str]) -> None:
    first, other = ({"authorization": f"Bearer {key}"} for key in (first_key[1], KEYS[1]))
    flood = {"prompt": "a", "max_tokens": 100_000, "priority": -1000, "n": 12, "stream": True}
    with keyed.http.stream("POST", "/v1/completions", json=flood, headers=first) as stream:
        assert stream.status_code == 200
        for priority in (0, 1000):
            body = {"prompt": "b", "max_tokens": 5, "priority": priority}
            assert keyed.http.post("/v1/completions", json=body, headers=other).status_code == 200
        metrics = keyed.metrics()
        assert metrics["bdh_num_requests_running"] + metrics["bdh_num_requests_waiting"] == 12, "the flood goes on"
    keyed.until_idle()


def test_a_key_that_asks_for_little_is_served_whatever_another_queues(keyed: Server) -> None:
    flood, drop = ({"authorization": f"Bearer {key}"} for key in KEYS)
    before = ended(keyed)
    flooding = [keyed.raw(ENDLESS | {"prompt": f"{n}"}, headers=flood) for n in range(30)]
    keyed.until(lambda m: m["bdh_num_requests_waiting"] >= 20)
    response = keyed.http.post("/v1/completions", json={"prompt": "b", "max_tokens": 5}, headers=drop)
    assert response.status_code == 200
    assert ended(keyed) == before + 1, "none of the flood has ended before it"
    assert keyed.metrics()["bdh_num_requests_waiting"] >= 20
    close(flooding)
    keyed.until_idle()


def test_a_full_queue_is_full_for_the_key_that_fills_it(serve: ServeFactory) -> None:
    flood, drop = ({"authorization": f"Bearer {key}"} for key in KEYS)
    options = ["auth.enabled=true", f"auth.api_keys={','.join(KEYS)}", "scheduler.max_running=2"]

    def ask_as(headers: dict[str, str]) -> Response:
        return server.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}, headers=headers)

    with serve(*options, "scheduler.max_queued_requests=8", model=TINY) as server, ThreadPoolExecutor(10) as pool:
        endless = [server.raw(ENDLESS, headers=flood) for _ in range(2)]
        server.until(lambda m: m["bdh_num_requests_running"] == 2)
        flooding = [pool.submit(ask_as, flood) for _ in range(8)]
        server.until(lambda m: (m["bdh_num_requests_running"], m["bdh_num_requests_waiting"]) == (2, 8))
        assert ask_as(flood).status_code == 429
        response = pool.submit(ask_as, drop)
        eventually(lambda: any(future.done() for future in flooding))  # the newest of them gives way
        close(endless)
        assert response.result().status_code == 200, response.result().text
        statuses = sorted(future.result().status_code for future in flooding)
    assert statuses == [200] * 7 + [429]


def test_a_chats_instructions_are_kept_for_the_next_one(tiny: Server, alone: Server) -> None:
    system = {"role": "system", "content": f"instructions: {STEM}"}
    bodies = [{"messages": [system, {"role": "user", "content": said}], "max_tokens": 8, "seed": 1} for said in "ab"]
    first, second = (tiny.http.post("/v1/chat/completions", json=body).json() for body in bodies)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == len(f"system: {system['content']}\n")
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    plain = alone.http.post("/v1/chat/completions", json=bodies[1]).json()
    assert second["choices"] == plain["choices"]


def test_keys_do_not_see_each_others_prefixes(keyed: Server) -> None:
    prompt = "mine alone: " + STEM
    cached = []
    for key in (*KEYS, *KEYS):
        headers = {"authorization": f"Bearer {key}"}
        response = keyed.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 2}, headers=headers).json()
        cached.append(response["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert cached == [0, 0, len(prompt) - 1, len(prompt) - 1]


def test_a_storm_of_clients_that_leave_leaves_everything_as_it_was(crowded: Server) -> None:
    for round in range(15):
        streams = [crowded.raw(ENDLESS | {"prompt": STEM[: 20 + number], "n": 1 + number % 2}) for number in range(20)]
        try:
            for stream in streams[: 1 + round % 5]:  # they run as soon as those before are seen to be gone
                assert stream.status in (200, 429)
        finally:
            close(streams, reset=round % 2 == 0)
    crowded.until_idle()
    metrics = crowded.metrics()
    assert metrics["bdh_num_requests_swapped"] == metrics["bdh_state_slots_usage_perc"] == 0
    assert ask(crowded, prompt="a", max_tokens=3)["usage"]["completion_tokens"] == 3


def begun(server: Server, number: int, **body: Any) -> list[RawStream]:
    """That many endless streams, each with its first token."""
    streams = [server.raw(ENDLESS | {"seed": seed} | body) for seed in range(number)]
    for stream in streams:
        stream.read_until(b"data: ")
    return streams


def ended(server: Server) -> float:
    """How many sequences have come to their length."""
    return server.metrics().get(ENDED, 0)


def close(streams: list[RawStream], reset: bool = False) -> None:
    for stream in streams:
        stream.close(reset)
