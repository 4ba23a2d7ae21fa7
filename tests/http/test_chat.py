"""/v1/chat/completions as the official client sees it."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessageParam

from tests.http.raw import Raw, post

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.conftest import ServeFactory, Server

CONFORMANCE = Path(__file__).parent.parent / "data" / "conformance"
PATH = "/v1/chat/completions"
MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "You are Romeo."},
    {"role": "user", "content": "Speak, é!"},
]
RENDERED = "system: You are Romeo.\nuser: Speak, é!\nassistant:"


def test_a_response_is_a_typed_object_with_exact_usage(server: Server) -> None:
    with server.openai() as client:
        completion = client.chat.completions.create(model="bdh-shakespeare", messages=MESSAGES, max_tokens=10)
    assert isinstance(completion, ChatCompletion)
    assert completion.object == "chat.completion"
    assert completion.id.startswith("chatcmpl-")
    (choice,) = completion.choices
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "length", 0)
    assert choice.message.content
    assert completion.usage is not None
    assert completion.usage.prompt_tokens == len(RENDERED.encode())
    assert completion.usage.completion_tokens == 10
    assert completion.usage.total_tokens == len(RENDERED.encode()) + 10


def test_the_default_template_is_lines_of_role_and_content(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    response = server.http.post(PATH, json=body)
    (choice,) = response.json()["choices"]
    assert bytes(response.json()["prompt_token_ids"]).decode() == RENDERED
    assert choice["message"]["content"] == server.text(prompt=RENDERED, max_tokens=20, temperature=0)


def test_all_roles_are_understood(tiny: Server) -> None:
    messages = [
        {"role": role, "content": role.upper()} for role in ("system", "developer", "user", "assistant", "tool")
    ]
    messages[-1]["tool_call_id"] = "1"
    response = tiny.http.post(PATH, json={"messages": messages, "max_tokens": 1, "return_token_ids": True})
    assert bytes(response.json()["prompt_token_ids"]).decode() == (
        "system: SYSTEM\ndeveloper: DEVELOPER\nuser: USER\nassistant: ASSISTANT\ntool: TOOL\nassistant:"
    )


def test_text_parts_are_one_text(tiny: Server) -> None:
    parts = [{"type": "text", "text": "Hello, "}, {"type": "text", "text": "world"}]
    of_parts, of_text = (
        tiny.http.post(PATH, json={"messages": [{"role": "user", "content": content}], "max_tokens": 8, "seed": 1})
        for content in (parts, "Hello, world")
    )
    assert of_parts.json()["choices"][0]["message"] == of_text.json()["choices"][0]["message"]


def test_a_response_can_be_sent_back_as_it_came(tiny: Server) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hello"}]
    with tiny.openai() as client:
        first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, seed=1)
        messages += [first.choices[0].message, {"role": "user", "content": "Go on"}]
        second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=4, seed=1)
    assert second.choices[0].finish_reason == "length"


def test_a_greedy_stream_equals_the_unstreamed_response(server: Server) -> None:
    with server.openai() as client:
        whole = client.chat.completions.create(
            model="bdh-shakespeare", messages=MESSAGES, max_completion_tokens=30, temperature=0
        )
        chunks = list(
            client.chat.completions.create(
                model="bdh-shakespeare",
                messages=MESSAGES,
                max_completion_tokens=30,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
            )
        )
    *chunks, last = chunks
    assert all(isinstance(chunk, ChatCompletionChunk) and chunk.object == "chat.completion.chunk" for chunk in chunks)
    assert len({chunk.id for chunk in (*chunks, last)}) == 1
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * (len(chunks) - 1)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert last.choices == []
    assert last.usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 30


async def test_the_async_client_streams_the_same(server: Server) -> None:
    async with server.async_openai() as client:
        whole = await client.chat.completions.create(
            model="bdh-shakespeare", messages=MESSAGES, max_tokens=20, seed=3, temperature=1.5
        )
        stream = await client.chat.completions.create(
            model="bdh-shakespeare", messages=MESSAGES, max_tokens=20, seed=3, temperature=1.5, stream=True
        )
        text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
    assert text == whole.choices[0].message.content


def test_the_clients_own_stream_helper_understands_it(server: Server) -> None:
    with server.openai() as client:
        whole = client.chat.completions.create(model="bdh-shakespeare", messages=MESSAGES, max_tokens=40, temperature=0)
        text = whole.choices[0].message.content or ""
        with client.chat.completions.stream(
            model="bdh-shakespeare", messages=MESSAGES, max_tokens=40, temperature=0, stop=text[20:23]
        ) as stream:
            final = stream.get_final_completion()
    assert final.choices[0].message.content == text[: text.index(text[20:23])]
    assert final.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_both_names_of_the_bound_bind(tiny: Server, field: str) -> None:
    response = tiny.http.post(PATH, json={"messages": MESSAGES, field: 3})
    assert response.json()["usage"]["completion_tokens"] == 3


def test_n_choices_are_streamed_apart(tiny: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 24, "n": 3, "seed": 8}
    whole = [choice["message"]["content"] for choice in tiny.http.post(PATH, json=body).json()["choices"]]
    choices = [choice for event in tiny.events(PATH, **body) for choice in event["choices"]]
    texts = ["".join(c["delta"].get("content", "") for c in choices if c["index"] == index) for index in range(3)]
    assert texts == whole
    assert len(set(whole)) == 3
    assert sorted(c["index"] for c in choices if c["delta"].get("role")) == [0, 1, 2]
    assert sorted(c["index"] for c in choices if c["finish_reason"]) == [0, 1, 2]


def test_a_stop_string_ends_the_response_before_it(server: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 30, "temperature": 0}
    text = server.http.post(PATH, json=body).json()["choices"][0]["message"]["content"]
    stop = text[12:15]
    choice = server.http.post(PATH, json=body | {"stop": [stop]}).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text[: text.index(stop)], "stop")
    events = server.events(PATH, **body, stop=stop)
    assert "".join(e["choices"][0]["delta"].get("content", "") for e in events) == text[: text.index(stop)]


def test_token_ids_come_with_each_chunk_and_the_prompt_once(tiny: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 10, "seed": 2, "return_token_ids": True}
    response = tiny.http.post(PATH, json=body).json()
    (whole,) = response["choices"]
    assert response["prompt_token_ids"] == list(RENDERED.encode())
    assert "prompt_token_ids" not in whole
    events = tiny.events(PATH, **body)
    choices = [event["choices"][0] for event in events]
    assert ["prompt_token_ids" in event for event in events] == [True] + [False] * (len(events) - 1)
    assert events[0]["prompt_token_ids"] == response["prompt_token_ids"]
    assert [token for c in choices for token in c.get("token_ids", [])] == whole["token_ids"]
    assert bytes(whole["token_ids"]).decode(errors="replace") == whole["message"]["content"]


def test_token_ids_do_not_come_unasked(tiny: Server) -> None:
    response = tiny.http.post(PATH, json={"messages": MESSAGES, "max_tokens": 2}).json()
    assert [response["prompt_token_ids"], response["choices"][0]["token_ids"]] == [None, None]  # as vLLM has it
    for event in tiny.events(PATH, messages=MESSAGES, max_tokens=2, stream_options={"include_usage": True}):
        assert "prompt_token_ids" not in event


SPINNING = (
    "{% if spin %}{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}{% endif %}"
    "{% for message in messages %}{{ message.content }}{% endfor %}"
)


@pytest.fixture(scope="module")
def keyed(serve: ServeFactory, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server of two keys, whose template spins if it is told to."""
    template = tmp_path_factory.mktemp("template") / "spinning.jinja"
    template.write_text(SPINNING)
    patient = ("sandbox.template_seconds=600", "sandbox.queue_seconds=600")
    options = ("auth.enabled=true", "auth.api_keys=a,b", f"chat.template={template}", *patient)
    with serve(*options, model=CONFORMANCE / "tiny") as server:
        yield server


def ask(server: Server, key: str, **more: object) -> httpx.Response:
    body = {"messages": MESSAGES, "max_tokens": 1, **more}
    return server.http.post(PATH, json=body, headers={"authorization": f"Bearer {key}"})


WAITING, RUNNING = (f"bdh_sandbox_jobs_{each}{{work=templates}}" for each in ("waiting", "running"))


def test_chats_that_spin_delay_no_other_key_and_go_with_their_clients(keyed: Server) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "chat_template_kwargs": {"spin": True}}
    spinning = [Raw(keyed, post(body, "authorization: Bearer a", path=PATH)) for _ in range(20)]
    keyed.until(lambda metrics: metrics[WAITING] == 19)
    assert ask(keyed, "b").status_code == 200
    metrics = keyed.metrics()
    assert (metrics[WAITING], metrics[RUNNING]) == (19, 1)
    for client in spinning:
        client.close()
    keyed.until(lambda metrics: metrics[WAITING] == metrics[RUNNING] == 0)
    assert ask(keyed, "a").status_code == 200


def test_killed_the_templates_processes_are_started_again(keyed: Server) -> None:
    def inside() -> list[psutil.Process]:
        return psutil.Process(keyed.process.pid).children(recursive=True)

    # By which both sandboxes are ready: one that is killed at its start is an error in the log.
    assert ask(keyed, "a", response_format={"type": "json_object"}).status_code == 200
    for process in inside():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended with one that was killed before it
            process.kill()
    assert ask(keyed, "a").status_code == 200
