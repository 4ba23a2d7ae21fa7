"""/v1/states, and requests that begin in a state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from bdh_batch.http.states.objects import StateList, StateObject

if TYPE_CHECKING:
    from tests.conftest import Server

PATH, COMPLETIONS, CHAT = "/v1/states", "/v1/completions", "/v1/chat/completions"
TEXT, MORE = "ROMEO:\nBut soft! what light", " through yonder window"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def made(server: Server, **body: Any) -> dict[str, Any]:
    """A new state; it must be of its type."""
    response = server.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    StateObject.model_validate_json(response.content)
    found: dict[str, Any] = response.json()
    return found


def listed(server: Server, **query: Any) -> dict[str, Any]:
    response = server.http.get(PATH, params=query)
    assert response.status_code == 200, response.text
    StateList.model_validate_json(response.content)
    found: dict[str, Any] = response.json()
    return found


@pytest.fixture(scope="module")
def state(tiny: Server) -> dict[str, Any]:
    return made(tiny, prompt=TEXT)


class TestBeginning:
    @pytest.mark.parametrize("prompt", [MORE, [*MORE.encode()]])
    def test_a_completion_goes_on_from_its_tokens(self, tiny: Server, state: dict[str, Any], prompt: Any) -> None:
        begun = tiny.complete(state=state["id"], prompt=prompt, return_token_ids=True, **GREEDY)
        whole = tiny.complete(prompt=TEXT + MORE, return_token_ids=True, **GREEDY)
        assert begun["choices"] == whole["choices"]
        assert begun["usage"]["prompt_tokens"] == len(TEXT + MORE)

    def test_every_prompt_and_every_choice_begins_in_it(self, tiny: Server, state: dict[str, Any]) -> None:
        asked = {"n": 3, "seed": 5, "max_tokens": 6}
        begun = tiny.complete(state=state["id"], prompt=["a", "b"], **asked)
        whole = tiny.complete(prompt=[f"{TEXT}a", f"{TEXT}b"], **asked)
        assert [each["text"] for each in begun["choices"]] == [each["text"] for each in whole["choices"]]

    def test_a_chat_adds_its_messages_and_no_others(self, tiny: Server, state: dict[str, Any]) -> None:
        begun = tiny.http.post(
            CHAT, json={"state": state["id"], "messages": [{"role": "user", "content": "a"}], **GREEDY}
        )
        same = tiny.text(prompt=f"{TEXT}user: a\nassistant:", **GREEDY)
        assert begun.json()["choices"][0]["message"]["content"] == same

    def test_a_stream_begins_in_it_too(self, tiny: Server, state: dict[str, Any]) -> None:
        events = tiny.events(state=state["id"], prompt=MORE, **GREEDY)
        text = "".join(choice["text"] for event in events for choice in event["choices"])
        assert text == tiny.text(prompt=TEXT + MORE, **GREEDY)

    def test_only_the_new_part_of_the_prompt_is_cut(self, tiny: Server, state: dict[str, Any]) -> None:
        begun = tiny.complete(
            state=state["id"], prompt="abc", truncate_prompt_tokens=1, return_token_ids=True, **GREEDY
        )
        assert begun["choices"][0]["prompt_token_ids"] == [*f"{TEXT}c".encode()]

    @pytest.mark.parametrize(
        ("path", "more", "param"),
        [
            (COMPLETIONS, {"prompt": "a", "echo": True}, "echo"),
            (COMPLETIONS, {"prompt": "a", "prompt_logprobs": 1}, "prompt_logprobs"),
            (COMPLETIONS, {"prompt": ""}, "prompt"),
            (CHAT, {"messages": [{"role": "user", "content": "a"}], "prompt_logprobs": 0}, "prompt_logprobs"),
        ],
    )
    def test_what_it_does_not_go_with_is_refused_by_name(
        self, tiny: Server, state: dict[str, Any], path: str, more: dict[str, Any], param: str
    ) -> None:
        assert tiny.refusal({"state": state["id"], **more}, path)["param"] == param

    @pytest.mark.parametrize("id", ["st_" + "0" * 32, "resp_1", "", "x" * 4000])
    def test_an_unknown_one_is_not_found(self, tiny: Server, id: str) -> None:
        error = tiny.refusal({"state": id, "prompt": "a"}, status=404)
        assert (error["param"], error["code"]) == ("state", "not_found")

    def test_a_state_and_its_prompt_have_the_models_bounds(self, tiny: Server) -> None:
        long = made(tiny, prompt=[97] * 131_000)
        error = tiny.refusal({"state": long["id"], "prompt": "a" * 200})
        assert (error["param"], error["code"]) == ("prompt", "context_length_exceeded")
        assert "limits.max_values" in tiny.refusal({"state": long["id"], "prompt": ["a"] * 5})["message"]


class TestObjects:
    def test_are_listed_shown_and_deleted(self, tiny: Server) -> None:
        first, second = (made(tiny, prompt="a", metadata={"n": str(n)}, ttl=100) for n in range(2))
        assert first["expires_at"] - first["created_at"] == 100
        page = listed(tiny, limit=1)
        assert (page["data"], page["has_more"], page["last_id"]) == ([second], True, second["id"])
        assert listed(tiny, limit=1, after=second["id"])["data"] == [first]
        assert tiny.http.get(f"{PATH}/{first['id']}").json() == first
        for each in (first, second):
            deleted = tiny.http.delete(f"{PATH}/{each['id']}").json()
            assert deleted == {"id": each["id"], "object": "state", "deleted": True}
            assert tiny.error(tiny.http.delete(f"{PATH}/{each['id']}"), 404)["code"] == "not_found"
        assert tiny.error(tiny.http.get(PATH, params={"after": first["id"]}), 404)["param"] == "after"

    def test_a_fork_outlives_what_it_was_made_of(self, tiny: Server) -> None:
        first = made(tiny, prompt=TEXT, metadata={"a": "b"})
        fork = made(tiny, state=first["id"], metadata={"c": "d"})
        assert {**fork, "id": "", "created_at": 0, "expires_at": 0} == {
            **first,
            **{"id": "", "created_at": 0, "expires_at": 0, "metadata": {"c": "d"}},
        }
        tiny.http.delete(f"{PATH}/{first['id']}")
        assert tiny.text(state=fork["id"], prompt=MORE, **GREEDY) == tiny.text(prompt=TEXT + MORE, **GREEDY)

    def test_one_of_a_response_has_read_all_of_it(self, tiny: Server) -> None:
        asked = {"input": "Speak!", "max_output_tokens": 8, "temperature": 0}
        response = tiny.http.post("/v1/responses", json=asked).json()
        state = made(tiny, response=response["id"])
        assert state["tokens"] == response["usage"]["total_tokens"]
        begun = tiny.complete(state=state["id"], prompt=MORE, return_token_ids=True, **GREEDY)["choices"][0]
        read = begun["prompt_token_ids"][: state["tokens"]]
        assert bytes(read).startswith(b"user: Speak!\nassistant:")
        assert begun["text"] == tiny.text(prompt=[*read, *MORE.encode()], **GREEDY)

    @pytest.mark.parametrize(
        ("path", "body"),
        [
            (COMPLETIONS, {"prompt": TEXT}),
            (COMPLETIONS, {"prompt": TEXT, "stream": True}),
            (COMPLETIONS, {"prompt": [TEXT, "b"], "n": 2, "best_of": 3, "seed": 1, "temperature": 1}),
            (CHAT, {"messages": [{"role": "user", "content": "a"}]}),
        ],
    )
    def test_one_of_a_completion_has_read_its_first_choice(self, tiny: Server, path: str, body: dict[str, Any]) -> None:
        asked = GREEDY | body
        response = tiny.http.post(path, json=asked)
        state = made(tiny, request=response.headers["x-request-id"])
        whole = tiny.http.post(path, json=asked | {"stream": None, "return_token_ids": True}).json()
        choice = whole["choices"][0]
        read = [*(whole.get("prompt_token_ids") or choice["prompt_token_ids"]), *choice["token_ids"]]
        assert state["tokens"] == len(read)
        asked = {"prompt": [98], "return_token_ids": True, **GREEDY}
        assert tiny.complete(state=state["id"], **asked)["choices"][0]["prompt_token_ids"] == [*read, 98]

    @pytest.mark.parametrize(
        ("body", "param", "status"),
        [
            ({}, "prompt", 400),
            ({"prompt": "a", "response": "resp_1"}, "response", 400),
            ({"prompt": ["a", "b"]}, "prompt", 400),
            ({"prompt": ""}, "prompt", 400),
            ({"prompt": [99999]}, "prompt", 400),
            ({"prompt": "a", "model": "none"}, "model", 404),
            ({"response": "resp_1", "model": "tiny"}, "model", 400),
            ({"response": "resp_1"}, "response", 404),
            ({"request": "r"}, "request", 404),
            ({"state": "st_1"}, "state", 404),
            ({"prompt": "a", "ttl": 0}, "ttl", 400),
            ({"prompt": "a", "ttl": 1e9}, "ttl", 400),
            ({"prompt": "a", "metadata": {"a": 1}}, "metadata.a", 400),
            ({"prompt": "a", "metadata": {"a": "b" * 513}}, "metadata.a", 400),
            ({"prompt": "a", "metadata": {str(n): "" for n in range(17)}}, "metadata", 400),
            ({"prompt": "a", "spare": 1}, "spare", 400),
        ],
    )
    def test_bad_input_is_refused_by_name(self, tiny: Server, body: dict[str, Any], param: str, status: int) -> None:
        assert tiny.refusal(body, PATH, status)["param"] == param

    @pytest.mark.parametrize("query", [{"limit": "0"}, {"limit": "101"}, {"limit": "x"}])
    def test_bad_pages_are_refused_by_name(self, tiny: Server, query: dict[str, str]) -> None:
        assert tiny.error(tiny.http.get(PATH, params=query), 400)["param"] == "limit"
