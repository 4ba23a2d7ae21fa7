"""Latent steps over HTTP: what clients ask for, what they get, and what is refused; engines in processes of their own,
and in the server's."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import openai
import pytest
import torch

from tests.reasoning import reasoning, write_folder
from tests.support import ending_in

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

COMPLETIONS, CHAT, RESPONSES, STATES = "/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/states"
PROMPT = "What is behind the seventh door? "
TOKENS = 12
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": TOKENS, "return_token_ids": True}
EFFORTS = {"minimal": 1, "low": 2, "medium": 4, "high": 16}
TEMPLATE = """\
{% for m in messages %}{{ m.role }}:{{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def folder(path: Path, **generation: Any) -> Path:
    write_folder(path, generation)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


@pytest.fixture(scope="module")
def several(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two engines in processes of their own."""
    model = folder(tmp_path_factory.mktemp("model") / "thinker", latent_steps=2, reasoning_effort=EFFORTS)
    options = ("engine.replicas=2", "engine.threads=1", "engine.heartbeat_seconds=3")
    with serve(*options, "prefix_cache.min_tokens=8", model=model, cutting=True) as server:
        yield server


@pytest.fixture(scope="module")
def bounded(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Nothing is kept of what was computed."""
    model = folder(tmp_path_factory.mktemp("model") / "thinker")
    options = ("prefix_cache.enabled=false", "store.response_states=false")
    bounds = ("model.min_latent_steps=1", "model.max_latent_steps=4", "model.max_model_len=100")
    with serve(*options, *bounds, model=model) as server:
        yield server


@pytest.mark.parametrize("update", [True, False])
def test_completions_are_those_of_the_package_alone_and_together(several: Server, update: bool) -> None:
    client, asked = several.openai(), [0, 1, 4, 16, *range(2, 30)]

    def ask(steps: int) -> tuple[list[int], Any]:
        more = {"return_token_ids": True, "latent_steps": steps, "update_latent_memory": update}
        prompt = PROMPT if steps in (0, 1, 4, 16) else f"{steps} {PROMPT}"
        response = client.completions.create(
            model="thinker", prompt=prompt, max_tokens=TOKENS, temperature=0, extra_body=more
        )
        choice: Any = response.choices[0]
        return choice.token_ids, response.usage

    with ThreadPoolExecutor(len(asked)) as threads:
        answers = [ask(steps) for steps in asked[:4]]
        answers += [*threads.map(ask, asked)]
    for steps, (tokens, usage) in zip([*asked[:4], *asked], answers):
        prompt = PROMPT if steps in (0, 1, 4, 16) else f"{steps} {PROMPT}"
        assert tokens == reasoning().answer(prompt.encode(), steps, TOKENS, update), steps
        assert usage.completion_tokens == TOKENS + steps
        assert usage.completion_tokens_details.reasoning_tokens == steps
        assert usage.prompt_tokens == len(prompt)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


@pytest.mark.parametrize(
    ("asked", "steps"),
    [
        ({}, 2),  # as the folder says
        ({"reasoning_effort": "none"}, 0),
        ({"reasoning_effort": "medium"}, 4),
        ({"reasoning_effort": "medium", "latent_steps": 4}, 4),
        ({"latent_steps": None, "reasoning_effort": None, "update_latent_memory": None}, 2),
    ],
)
def test_an_effort_is_so_many_steps_in_every_api(several: Server, asked: dict[str, Any], steps: int) -> None:
    text = f"user:{PROMPT}\nassistant:".encode()
    expected = reasoning().answer(text, steps, TOKENS)
    message = {"messages": [{"role": "user", "content": PROMPT}]}
    whole = several.http.post(CHAT, json=message | GREEDY | asked).json()
    assert whole["choices"][0]["token_ids"] == expected
    assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": steps}
    options = {"include_usage": True, "continuous_usage_stats": True}
    events = several.events(CHAT, **message, **GREEDY, **asked, stream_options=options)
    assert events[-1]["usage"] == whole["usage"] | {
        "prompt_tokens_details": events[-1]["usage"]["prompt_tokens_details"]
    }
    counted = [event["usage"]["completion_tokens"] for event in events]
    assert counted == sorted(counted)
    assert counted[0] >= steps
    effort = asked.get("reasoning_effort")
    more = {"reasoning": {"effort": effort}, "latent_steps": asked.get("latent_steps")}
    response = several.http.post(
        RESPONSES, json={"input": PROMPT, "temperature": 0, "max_output_tokens": TOKENS} | more
    )
    found = response.json()
    assert found["reasoning"]["effort"] == effort
    assert found["usage"]["output_tokens_details"] == {"reasoning_tokens": steps}
    assert found["usage"]["output_tokens"] == steps + TOKENS
    assert found["output"][0]["content"][0]["text"] == whole["choices"][0]["message"]["content"]


@pytest.mark.parametrize("fixture", ["several", "bounded"])
def test_the_next_turn_goes_on_from_the_state_after_latent_steps(request: pytest.FixtureRequest, fixture: str) -> None:
    """In `bounded` it is computed from the stored tokens."""
    server: Server = request.getfixturevalue(fixture)
    body = {"temperature": 0, "max_output_tokens": 5, "latent_steps": 4}
    first = server.http.post(RESPONSES, json=body | {"input": "Who?"}).json()
    stages: list[torch.Tensor | int] = [torch.tensor([[*b"user:Who?\nassistant:"]]), 4]
    said = reasoning().after(stages, 5, True, True)
    assert first["output"][0]["content"][0]["text"] == bytes(said).decode(errors="replace")
    goes_on = body | {"input": "And?", "previous_response_id": first["id"], "update_latent_memory": False}
    second = server.http.post(RESPONSES, json=goes_on | {"latent_steps": 3}).json()
    stages += [torch.tensor([[*said, *b"\nuser:And?\nassistant:"]]), 3]
    again = reasoning().after(stages, 5, True, True, True, False)
    assert second["output"][0]["content"][0]["text"] == bytes(again).decode(errors="replace")
    assert second["usage"]["input_tokens"] == len("user:Who?\nassistant:") + 4 + 5 + len("\nuser:And?\nassistant:")
    third = server.http.post(
        RESPONSES, json=body | {"input": "So?", "previous_response_id": second["id"], "latent_steps": 1}
    ).json()
    stages += [torch.tensor([[*again, *b"\nuser:So?\nassistant:"]]), 1]
    last = reasoning().after(stages, 5, True, True, True, False, True, True)
    assert third["output"][0]["content"][0]["text"] == bytes(last).decode(errors="replace")


def test_a_state_holds_the_latent_steps_that_it_has_read(several: Server) -> None:
    asked = {"prompt": PROMPT, "latent_steps": 4, **GREEDY}
    first = several.http.post(COMPLETIONS, json=asked, headers={"x-request-id": "thought-1"})
    said = first.json()["choices"][0]["token_ids"]
    state = several.http.post(STATES, json={"request": "thought-1"}).json()
    assert state["tokens"] == len(PROMPT) + 4 + TOKENS
    stages: list[torch.Tensor | int] = [torch.tensor([[*PROMPT.encode()]]), 4, torch.tensor([[*said, *b" then"]]), 2]
    expected = reasoning().after(stages, TOKENS, True, True, True, True)

    def goes_on(id: str) -> list[int]:
        response = several.http.post(COMPLETIONS, json={"prompt": " then", "state": id, **GREEDY})
        found: list[int] = response.json()["choices"][0]["token_ids"]
        return found

    assert goes_on(state["id"]) == expected
    file = several.http.get(f"{STATES}/{state['id']}/content").content
    uploaded = several.http.post(f"{STATES}/content", content=file)
    assert uploaded.status_code == 200, uploaded.text
    assert goes_on(uploaded.json()["id"]) == expected
    refused = several.http.post(f"{STATES}/content", content=ending_in(file, math.nan))  # in the hidden vector
    assert "finite" in several.error(refused, 400)["message"]
    of_prompt = several.http.post(STATES, json={"prompt": PROMPT}).json()
    thought = {"prompt": " then", "state": of_prompt["id"], "latent_steps": 4, **GREEDY}
    found = several.http.post(COMPLETIONS, json=thought).json()["choices"][0]["token_ids"]
    assert found == reasoning().answer(PROMPT.encode() + b" then", 4, TOKENS)


def test_prompts_that_are_scored_have_no_latent_steps(several: Server, bounded: Server) -> None:
    asked = {"prompt": PROMPT, "echo": True, "logprobs": 1, "max_tokens": 0}
    for server in (several, bounded):
        scored = server.http.post(COMPLETIONS, json=asked).json()
        assert scored["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}
        assert scored["choices"][0]["text"] == PROMPT
        assert server.refusal(asked | {"latent_steps": 1})["param"] == "latent_steps"
    whole = several.http.post(COMPLETIONS, json=asked | {"max_tokens": 2, "latent_steps": 4, "temperature": 0}).json()
    assert whole["choices"][0]["logprobs"]["token_logprobs"][: len(PROMPT)] == pytest.approx(
        scored["choices"][0]["logprobs"]["token_logprobs"], abs=1e-4
    )
    assert len(whole["choices"][0]["logprobs"]["tokens"]) == len(PROMPT) + 2


@pytest.mark.parametrize(
    ("path", "change", "param", "text"),
    [
        (COMPLETIONS, {"latent_steps": -1}, "latent_steps", "greater than or equal to 0"),
        (COMPLETIONS, {"latent_steps": "4"}, "latent_steps", "integer"),
        (COMPLETIONS, {"latent_steps": True}, "latent_steps", "integer"),
        (COMPLETIONS, {"latent_steps": 5}, "latent_steps", "at most 4 (model.max_latent_steps)"),
        (COMPLETIONS, {"latent_steps": 0}, "latent_steps", "at least 1 (model.min_latent_steps)"),
        (COMPLETIONS, {"update_latent_memory": 1}, "update_latent_memory", "boolean"),
        (COMPLETIONS, {"reasoning_effort": "low"}, "reasoning_effort", "generation_config.json"),
        (CHAT, {"reasoning_effort": "none"}, "reasoning_effort", "at least 1 (model.min_latent_steps)"),
        (CHAT, {"reasoning_effort": "none", "latent_steps": 2}, "latent_steps", "give one of them"),
        (RESPONSES, {"latent_steps": 65}, "latent_steps", "model.max_latent_steps"),
        (RESPONSES, {"reasoning": {"effort": "high"}}, "reasoning.effort", "generation_config.json"),
        (COMPLETIONS, {"prompt": [65, -1, 66]}, "prompt", "Token ids run from 0 to 255"),
        (COMPLETIONS, {"prompt": [[65, -2]]}, "prompt", "Token ids run from 0 to 255"),
        (STATES, {"prompt": [65, -1]}, "prompt", "Token ids run from 0 to 255"),
        (COMPLETIONS, {"latent_steps": 4, "max_tokens": 97}, "max_tokens", "1 prompt tokens, 4 latent steps and 97"),
    ],
)
def test_what_is_wrong_is_refused_by_name(
    bounded: Server, path: str, change: dict[str, Any], param: str, text: str
) -> None:
    bodies: dict[str, dict[str, Any]] = {
        COMPLETIONS: {"prompt": "a", "max_tokens": 1},
        CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1},
        RESPONSES: {"input": "a"},
        STATES: {},
    }
    error = bounded.refusal(bodies[path] | change, path)
    assert error["param"] == param
    assert text in error["message"]


def test_a_prompt_is_cut_so_that_its_latent_steps_have_room(bounded: Server) -> None:
    asked = {"prompt": PROMPT * 9, "truncate_prompt_tokens": -1, "latent_steps": 4, "max_tokens": 20}
    usage = bounded.complete(**asked)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (100 - 20 - 4, 20 + 4)


def test_an_effort_that_the_folder_does_not_have_is_refused_with_those_it_has(several: Server) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "reasoning_effort": "extreme"}
    error = several.refusal(body, CHAT)
    assert error["param"] == "reasoning_effort"
    assert "'none', 'minimal', 'low', 'medium', 'high'" in error["message"]
    with pytest.raises(openai.BadRequestError, match="reasoning_effort"):
        several.openai().chat.completions.create(
            model="thinker", messages=[{"role": "user", "content": "a"}], reasoning_effort="xhigh"
        )


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"latent_steps": 1}, "latent_steps"),
        ({"update_latent_memory": False}, "update_latent_memory"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_a_model_without_latent_steps_refuses_them_by_name(tiny: Server, change: dict[str, Any], param: str) -> None:
    for path, body in (
        (COMPLETIONS, {"prompt": "a"}),
        (CHAT, {"messages": [{"role": "user", "content": "a"}]}),
    ):
        error = tiny.refusal(body | change, path)
        assert (error["param"], error["code"]) == (param, "unsupported_parameter")
    nothing = {"latent_steps": 0, "update_latent_memory": True, "reasoning_effort": "none"}
    found = tiny.complete(prompt="a", max_tokens=1, **nothing)
    assert "completion_tokens_details" not in found["usage"]


def test_another_engine_goes_on_where_one_is_lost(several: Server) -> None:
    steps, tokens = 16, 400
    expected = reasoning().answer(PROMPT.encode(), steps, tokens)
    more = {"latent_steps": steps, "return_token_ids": True}
    client, begun = several.openai(), threading.Semaphore(0)
    engines = several.http.get("/server_info").json()["engines"]

    def stream(_: int) -> list[int]:
        found: list[int] = []
        for chunk in client.completions.create(
            model="thinker", prompt=PROMPT, max_tokens=tokens, temperature=0, stream=True, extra_body=more
        ):
            choice: Any = chunk.choices[0]
            found += choice.token_ids
            if len(found) == 1:
                begun.release()
        return found

    with ThreadPoolExecutor(8) as threads:
        running = [threads.submit(stream, number) for number in range(8)]
        for _ in running:
            assert begun.acquire(timeout=300)
        os.kill(engines[0]["pid"], signal.SIGKILL)
        assert all(each.result() == expected for each in running)


def test_the_bounds_of_a_model_without_latent_steps_are_refused_at_its_start(tmp_path: Path, cli: Any) -> None:
    model = folder(tmp_path / "thinker", reasoning_effort={"low": -1})
    for options, text in (
        (
            ["--set", "model.min_latent_steps=9", "--set", "model.max_latent_steps=8"],
            "model.min_latent_steps: 9 is more",
        ),
        ([], "reasoning_effort should give each effort a number of steps"),
    ):
        done = cli("serve", "--port", 0, "--model", model, *options)
        assert done.returncode != 0
        assert text in done.stderr
