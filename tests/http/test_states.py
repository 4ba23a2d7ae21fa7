"""/v1/states, and requests that begin in a state."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from bdh_batch.http.states.objects import StateList, StateObject
from tests.conftest import HANG_SECONDS, eventually
from tests.store.test_store import damage

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PATH, COMPLETIONS, CHAT, RESPONSES = "/v1/states", "/v1/completions", "/v1/chat/completions", "/v1/responses"
OCTETS = "application/octet-stream"
TEXT, MORE = "ROMEO:\nBut soft! what light", " through yonder window"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def damaged_500(response: httpx.Response) -> bool:
    error = response.json()["error"]
    return (response.status_code, error["code"]) == (500, "store_failed") and "damaged" in error["message"]


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


@pytest.fixture(scope="module")
def narrow(serve: ServeFactory) -> Iterator[Server]:
    """There is room for two files, and there are two front ends."""
    with serve("store.max_bytes=160000", "server.workers=2", model=TINY) as server:
        yield server


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

    def test_kserve_begins_in_it_too(self, tiny: Server, state: dict[str, Any]) -> None:
        asked = {"text_input": MORE, "parameters": {"state": state["id"], **GREEDY}}
        begun = tiny.http.post("/v2/models/tiny/generate", json=asked)
        assert begun.json()["text_output"].endswith(tiny.text(prompt=TEXT + MORE, **GREEDY))

    async def test_a_hundred_at_once_say_what_each_says_alone(self, tiny: Server, state: dict[str, Any]) -> None:
        async with httpx.AsyncClient(base_url=tiny.url, timeout=HANG_SECONDS) as client:
            asked = [{"state": state["id"], "prompt": f"{n}", **GREEDY} for n in range(100)]
            forks = await asyncio.gather(*(client.post(COMPLETIONS, json=body) for body in asked))
        for number, fork in enumerate(forks):
            assert fork.json()["choices"][0]["text"] == tiny.text(prompt=f"{TEXT}{number}", **GREEDY)
        tiny.until_idle()

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


class TestResponses:
    """Conversations of /v1/responses that begin in a state."""

    def test_every_turn_comes_after_the_state(self, tiny: Server, state: dict[str, Any]) -> None:
        asked = {"max_output_tokens": 8, "temperature": 0}
        first = tiny.http.post(RESPONSES, json={"input": "a", "state": state["id"], **asked}).json()
        begun = len(TEXT) + len("user: a\nassistant:")
        assert first["usage"]["input_tokens"] == begun
        counted = tiny.http.post(f"{RESPONSES}/input_tokens", json={"input": "a", "state": state["id"]}).json()
        assert counted["input_tokens"] == begun
        second = tiny.http.post(RESPONSES, json={"input": "b", "previous_response_id": first["id"], **asked}).json()
        assert second["usage"]["input_tokens"] >= begun + 8 + len("\nuser: b\nassistant:")
        after = made(tiny, response=second["id"])
        read = tiny.complete(state=after["id"], prompt="c", return_token_ids=True, **GREEDY)["choices"][0]
        assert bytes(read["prompt_token_ids"]).startswith(f"{TEXT}user: a\nassistant:".encode())
        assert bytes(read["prompt_token_ids"]).count(TEXT.encode()) == 1

    @pytest.mark.parametrize(
        ("more", "param", "status"),
        [({"previous_response_id": "resp_1"}, "state", 400), ({"state": "st_1"}, "state", 404)],
    )
    def test_bad_input_is_refused_by_name(
        self, tiny: Server, state: dict[str, Any], more: dict[str, Any], param: str, status: int
    ) -> None:
        assert tiny.refusal({"input": "a", "state": state["id"]} | more, RESPONSES, status)["param"] == param


class TestFiles:
    def test_a_state_whose_file_made_room_for_others_is_computed_again(self, narrow: Server) -> None:
        first, *_ = [made(narrow, prompt=TEXT + "x" * n) for n in range(4)]
        assert narrow.http.get(f"{PATH}/{first['id']}").json()["bytes"] == 0
        assert narrow.text(state=first["id"], prompt=MORE, **GREEDY) == narrow.text(prompt=TEXT + MORE, **GREEDY)
        content = narrow.http.get(f"{PATH}/{first['id']}/content")
        assert content.status_code == 200, content.text
        assert narrow.http.get(f"{PATH}/{first['id']}").json()["bytes"] == first["bytes"] > 0
        assert len(content.content) > first["bytes"]

    def test_another_process_remembers_a_completion(self, narrow: Server) -> None:
        ids = []
        for number in range(8):  # each on a connection of its own
            response = httpx.post(f"{narrow.url}{COMPLETIONS}", json={"prompt": f"{number}", **GREEDY}, timeout=300)
            ids.append(response.headers["x-request-id"])
        assert [made(narrow, request=id)["tokens"] for id in ids] == [13] * 8

    def test_what_does_not_fit_the_store_is_refused(self, serve: ServeFactory) -> None:
        with serve("store.max_bytes=30000", model=TINY) as server:
            error = server.http.post(PATH, json={"prompt": "a"})
            assert (error.status_code, error.json()["error"]["code"]) == (507, "store_full")
            assert listed(server)["data"] == []
            assert server.text(prompt="a", **GREEDY)

    def test_states_outlive_their_server_and_lie_encrypted(self, serve: ServeFactory, tmp_path: Path) -> None:
        options = [f"store.path={tmp_path}", f"store.encryption_key={base64.b64encode(bytes(32)).decode()}"]
        with serve(*options, model=TINY) as server:
            state = made(server, prompt=TEXT, metadata={"scene": "balcony"})
            said = server.text(state=state["id"], prompt=MORE, **GREEDY)
            file = server.http.get(f"{PATH}/{state['id']}/content").content
        stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        assert len(stored) > state["bytes"]
        assert not any(part in stored for part in (b"balcony", state["fingerprint"].encode(), file[-64:]))
        with serve(*options, model=TINY) as server:
            assert listed(server)["data"] == [state]
            begun = server.complete(state=state["id"], prompt=MORE, **GREEDY)
            assert begun["choices"][0]["text"] == said
            assert begun["usage"]["prompt_tokens_details"]["cached_tokens"] == len(TEXT)
            assert server.http.get(f"{PATH}/{state['id']}/content").content == file
            copy = server.http.post(f"{PATH}/content", content=file, headers={"content-type": OCTETS}).json()
            assert server.text(state=copy["id"], prompt=MORE, **GREEDY) == said

    def test_lists_leave_out_what_is_damaged(self, serve: ServeFactory, tmp_path: Path) -> None:
        with serve(f"store.path={tmp_path}", model=TINY) as server:
            asked = {"input": "a", "max_output_tokens": 1}
            states = [made(server, prompt=TEXT)["id"] for _ in range(4)]
            responses = [server.http.post(RESPONSES, json=asked).json()["id"] for _ in range(4)]
            server.until_idle()
            for path, (oldest, *damaged, other, newest) in ((PATH, states), (RESPONSES, responses)):
                damage(tmp_path, *damaged, newest)
                pages = [server.http.get(path).json(), server.http.get(path, params={"limit": 1}).json()]
                pages.append(server.http.get(path, params={"limit": 1, "after": other}).json())
                ids = [[each["id"] for each in page["data"]] for page in pages]
                assert ids == [[other, oldest], [other], [oldest]]
                assert [page["has_more"] for page in pages] == [False, True, False]
                assert damaged_500(server.http.get(f"{path}/{newest}"))
            assert damaged_500(server.http.post(PATH, json={"response": newest}))
            assert server.metrics()["bdh_store_failures_total{call=damaged}"] >= 8

    def test_a_state_of_another_model_is_refused_by_name(self, serve: ServeFactory, tmp_path: Path) -> None:
        option = f"store.path={tmp_path}"
        with serve(option, model=TINY) as server:
            state = made(server, prompt=TEXT)
        with serve(option, "model.name=other", model=TINY) as server:
            error = server.refusal({"state": state["id"], "prompt": "a"})
            assert (error["param"], "'tiny'" in error["message"]) == ("state", True)

    def test_one_is_used_while_it_is_deleted(self, tiny: Server) -> None:
        state = made(tiny, prompt=TEXT)
        stream = tiny.raw({"state": state["id"], "prompt": MORE, "max_tokens": 200, "stream": True, "seed": 1})
        stream.read_until(b"data: ")
        assert tiny.http.delete(f"{PATH}/{state['id']}").status_code == 200
        assert b"data: [DONE]" in stream.read_all()
        stream.close()
        assert tiny.refusal({"state": state["id"], "prompt": "a"}, status=404)["param"] == "state"

    def test_one_that_is_deleted_while_its_file_is_made_again_stays_deleted(self, serve: ServeFactory) -> None:
        options = ("store.max_bytes=160000", "prefix_cache.enabled=false", "scheduler.max_running=1")
        with serve(*options, model=TINY) as server:
            path = f"{PATH}/{made(server, prompt=[97] * 10_000)['id']}"
            made(server, prompt=TEXT)  # there is no room for the file of the first one any more
            endless = server.raw({"prompt": "a", "max_tokens": 100_000, "stream": True})
            endless.read_until(b"data: ")
            with ThreadPoolExecutor(1) as thread:
                download = thread.submit(server.http.get, f"{path}/content")
                server.until(lambda metrics: metrics["bdh_num_requests_waiting"] == 1)
                assert server.http.delete(path).status_code == 200
                endless.close()
                assert server.error(download.result(), 404)["code"] == "not_found"
            server.error(server.http.get(path), 404)
            assert len(listed(server)["data"]) == 1

    def test_one_that_has_expired_is_not_there(self, tiny: Server) -> None:
        state = made(tiny, prompt="a", ttl=0.01)
        eventually(lambda: tiny.http.get(f"{PATH}/{state['id']}").status_code == 404)
        assert tiny.refusal({"state": state["id"], "prompt": "a"}, status=404)["param"] == "state"


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
