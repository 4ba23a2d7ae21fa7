"""Conversations go on from the saved states of their responses: nothing is computed again, and nothing else is said."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import shutil
import struct
import tempfile
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from bdh_batch.http.responses_api.stored.transcript import end_of
from tests.conftest import HANG_SECONDS, eventually
from tests.http.test_responses import text_of

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PATH, CHAT, STATES = "/v1/responses", "/v1/chat/completions", "/v1/states"
TURNS, TOKENS = 20, 8
LETTERS = [*range(ord("a"), ord("z") + 1)]  # so that the text of a turn has the tokens that were drawn
ASKED: dict[str, Any] = {"temperature": 0, "allowed_token_ids": LETTERS}
TEMPLATE = """\
{% for m in messages %}{{ m.role }}:{{ m.content }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""
MEMORY = Path("/dev/shm")
Start = Callable[..., AbstractContextManager["Server"]]


@pytest.fixture
def start(serve: ServeFactory, tmp_path: Path) -> Start:
    """Starts a server on one store. Its states are in no cache: what is not computed has come from a file."""
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = (f"store.path={tmp_path / 'store'}", f"chat.template={template}", "prefix_cache.enabled=false")
    return lambda *more, model=TINY: serve(*options, *more, model=model)


def ask(server: Server, text: str, before: str | None = None, **more: Any) -> dict[str, Any]:
    """The response, once its state is stored."""
    states = server.metrics()["bdh_store_states"]
    body = {"input": text, "previous_response_id": before, "max_output_tokens": TOKENS, **ASKED, **more}
    response = server.http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    server.until(lambda metrics: metrics["bdh_store_states"] > states)
    found: dict[str, Any] = response.json()
    return found


def uninterrupted(server: Server, said: list[str]) -> str:
    """What is said after all that was said by turns, computed at once."""
    messages = [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(said)]
    body = {"messages": messages, "max_tokens": TOKENS, **ASKED}
    return str(server.http.post(CHAT, json=body).json()["choices"][0]["message"]["content"])


def computed(response: dict[str, Any]) -> int:
    """Tokens of the prompt."""
    usage = response["usage"]
    return int(usage["input_tokens"] - usage["input_tokens_details"]["cached_tokens"])


def test_a_long_conversation_goes_on_also_after_a_restart_and_from_its_middle(start: Start) -> None:
    said: list[str] = []
    ids: list[str] = []

    def turns(server: Server, number: int) -> None:
        for _ in range(number):
            said.append(f"Speak {len(ids):2}!")
            response = ask(server, said[-1], ids[-1] if ids else None)
            # The last token of the turn before was drawn, and has not been read yet.
            new = len(f"user:{said[-1]}\nassistant:")
            assert computed(response) == (new if not ids else 1 + len("\n") + new)
            text = text_of(response)
            assert text == uninterrupted(server, said)
            said.append(text)
            ids.append(response["id"])

    with start() as server:
        turns(server, TURNS // 2)
    with start() as server:
        turns(server, TURNS - TURNS // 2)
        middle = [*said[:10], "And then?"]
        forks = [ask(server, middle[-1], ids[4]) for _ in range(2)]
        assert {text_of(fork) for fork in forks} == {uninterrupted(server, middle)}
        assert {computed(fork) for fork in forks} == {1 + len("\nuser:And then?\nassistant:")}


@pytest.mark.skipif(not MEMORY.is_dir(), reason="needs a folder in memory: a disk may take longer than a turn waits")
def test_a_turn_that_comes_before_the_state_of_the_last_one_is_stored_waits_for_it(start: Start) -> None:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder, start(f"store.path={folder}") as server:
        said: list[str] = []
        before = None
        for number in range(8):
            body = {"input": f"Speak {number}!", "previous_response_id": before, "max_output_tokens": TOKENS, **ASKED}
            response = server.http.post(PATH, json=body).json()
            new = len(f"user:Speak {number}!\nassistant:")
            # It waits for so long only, and the machine may be busy: then all is computed.
            whole = response["usage"]["input_tokens"]
            assert computed(response) in ((new,) if before is None else (1 + len("\n") + new, whole))
            said += [f"Speak {number}!", text_of(response)]
            before = response["id"]
        assert said[-1] == uninterrupted(server, said[:-1])


async def test_a_hundred_forks_at_once_say_what_each_says_alone_and_leave_nothing(start: Start, tmp_path: Path) -> None:
    work = tmp_path / "store" / "work"

    def in_use(server: Server) -> tuple[float, list[Path]]:
        """The share of the slots, and the files on their way to the store or from there."""
        server.until_alone()
        return server.metrics()["bdh_state_slots_usage_perc"], [*work.glob("*/*")]

    with start() as server:
        first = ask(server, "Who is there?")
        eventually(lambda: in_use(server) == (0, []))
        more = {"previous_response_id": first["id"], "max_output_tokens": TOKENS, **ASKED}
        async with httpx.AsyncClient(base_url=server.url, timeout=HANG_SECONDS) as client:
            bodies = [{"input": f"{number:3}", **more} for number in range(100)]
            responses = await asyncio.gather(*(client.post(PATH, json=body) for body in bodies))
        for number, response in enumerate(responses):
            found = response.json()
            assert text_of(found) == uninterrupted(server, ["Who is there?", text_of(first), f"{number:3}"])
            assert computed(found) <= 1 + len("\nuser:100\nassistant:")  # less where forks share their beginnings
        eventually(lambda: in_use(server) == (0, []))


def with_another_weight(folder: Path) -> None:
    """Changes one number of a model; all else, its name too, stays as it was."""
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(content[:8], "little")
    at = begin + json.loads(content[8:begin])["encoder"]["data_offsets"][0]
    content[at : at + 4] = struct.pack("<f", 1 + struct.unpack("<f", content[at : at + 4])[0])
    file.write_bytes(content)


def test_with_other_weights_a_state_is_refused_and_a_conversation_computed_again(start: Start, tmp_path: Path) -> None:
    model = tmp_path / "tiny"
    shutil.copytree(TINY, model)
    with start(model=model) as server:
        first, state = ask(server, "Who?"), new_state(server)
        said = completion(server, state)
    shutil.copytree(model, tmp_path / "before" / "tiny")
    with_another_weight(model)
    for _ in range(2):
        with start(model=model) as server:
            for path, field in (("/v1/completions", "prompt"), (PATH, "input")):
                error = server.refusal({field: "a", "state": state}, path)
                assert (error["param"], error["code"]) == ("state", "invalid_state")
                assert "another model" in error["message"]
            goes_on = {"input": "I.", "previous_response_id": first["id"], "max_output_tokens": TOKENS, "store": False}
            after = server.http.post(PATH, json=goes_on | ASKED).json()
            assert computed(after) == after["usage"]["input_tokens"]
            assert text_of(after) == uninterrupted(server, ["Who?", text_of(first), "I."])
    with start(model=tmp_path / "before" / "tiny") as server:
        assert completion(server, state) == said
    for file in (tmp_path / "store" / "states").iterdir():
        file.unlink()
    with start(model=model) as server:  # nor is it made of its tokens, where its file is gone
        assert server.refusal({"prompt": "a", "state": state})["param"] == "state"
        assert server.error(server.http.get(f"{STATES}/{state}/content"), 400)["param"] == "state"


@pytest.mark.parametrize("fate", ["deleted", "damaged", "not saved"])
def test_without_its_state_a_conversation_goes_on_from_its_tokens(start: Start, tmp_path: Path, fate: str) -> None:
    options = ["store.response_states=false"] if fate == "not saved" else []
    with start(*options) as server:
        if options:
            first = server.http.post(PATH, json={"input": "Who?", "max_output_tokens": TOKENS, **ASKED}).json()
            assert server.metrics()["bdh_store_states"] == 0
        else:
            first = ask(server, "Who?")
        for file in (tmp_path / "store" / "states").iterdir():
            if fate == "deleted":
                file.unlink()
            else:
                file.write_bytes(file.read_bytes()[:-8] + bytes(8))
        body = {"input": "I.", "previous_response_id": first["id"], "max_output_tokens": TOKENS, **ASKED}
        after = server.http.post(PATH, json=body).json()
        assert computed(after) == after["usage"]["input_tokens"]
        assert text_of(after) == uninterrupted(server, ["Who?", text_of(first), "I."])


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda file: b"",
    "cut off": lambda file: file[:-1],
    "header": lambda file: file[:8] + b"{" * 8 + file[16:],
    "tensor": lambda file: file[:-8] + bytes(8),
}


def turn(server: Server, before: str) -> str:
    body = {"input": "I.", "previous_response_id": before, "max_output_tokens": TOKENS, "store": False, **ASKED}
    return text_of(server.http.post(PATH, json=body).json())


def new_response(server: Server) -> str:
    return str(ask(server, "Who?")["id"])


def new_state(server: Server) -> str:
    return str(server.http.post(STATES, json={"prompt": "Who is there?"}).json()["id"])


def completion(server: Server, state: str) -> Any:
    body = {"prompt": "I.", "state": state, "max_tokens": TOKENS, **ASKED}
    return server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]


# What makes a file, what is done with it, and whether the whole of it is looked at then.
USES: list[tuple[Callable[[Server], str], Callable[[Server, str], Any], bool]] = [
    (new_response, turn, True),
    (new_response, lambda server, id: server.http.post(STATES, json={"response": id}).json()["tokens"], False),
    (new_state, completion, True),
    (new_state, lambda server, id: server.http.get(f"{STATES}/{id}/content").content, False),
]


@pytest.mark.parametrize("key", [None, base64.b64encode(bytes(32)).decode()])
def test_a_stored_state_that_is_damaged_is_made_again_counted_and_removed(
    start: Start, tmp_path: Path, key: str | None
) -> None:
    folder = tmp_path / "store" / "states"

    def damaged(metrics: Mapping[str, float]) -> float:
        return metrics.get("bdh_store_failures_total{call=damaged}", 0)

    def is_removed(file: Path, counted: float) -> None:
        server.until(lambda metrics: damaged(metrics) == counted)
        eventually(lambda: not file.exists())

    with start(*([] if key is None else [f"store.encryption_key={key}"])) as server:
        for make, use, whole in USES:
            expected = use(server, make(server))
            for damage in [*DAMAGE.values()] if key is None else [DAMAGE["tensor"]]:
                server.until_idle()
                before, found = {*folder.iterdir()}, damaged(server.metrics())
                id = make(server)
                (file,) = {*folder.iterdir()} - before
                file.write_bytes(damage(file.read_bytes()))
                if whole or key is not None or damage is not DAMAGE["tensor"]:
                    assert use(server, id) == expected
                    is_removed(file, found + 1)


def test_what_is_not_to_be_stored_has_no_state(start: Start, tmp_path: Path) -> None:
    with start() as server:
        for more in ({"store": False}, {"max_output_tokens": 1, "stream": True}):
            body = {"input": "Who?", "max_output_tokens": TOKENS, **ASKED, **more}
            assert server.http.post(PATH, json=body).status_code == 200
        server.until(lambda metrics: metrics["bdh_store_states"] == 1)
        with contextlib.suppress(FileNotFoundError):
            assert not [*(tmp_path / "store" / "work").glob("*/*")]


@pytest.mark.parametrize("content", ["{{ m.content }}", " {{ m.content | trim }}"])
def test_a_template_may_change_the_white_space_around_what_was_said(start: Start, tmp_path: Path, content: str) -> None:
    (tmp_path / "template.jinja").write_text(TEMPLATE.replace("{{ m.content }}", content))
    with start() as server:
        for said in (LETTERS, [ord(" ")], [ord("\n"), *LETTERS]):
            first = ask(server, "Who?", allowed_token_ids=said)
            after = ask(server, "I.", first["id"])
            # Of nothing but white space nobody can say where it ends.
            known = content.startswith("{") or text_of(first).strip()
            new = 1 + len("\nuser:") + len(content) - len(content.lstrip()) + len("I.\nassistant:")
            assert computed(after) == (new if known else after["usage"]["input_tokens"])


def test_the_next_turn_computes_nothing_again_though_the_file_is_still_written(serve: ServeFactory) -> None:
    with serve(model=TINY) as server:
        before, texts = None, ("a", "b", "c", "d")
        for text in texts:
            body = {"input": text, "previous_response_id": before, "max_output_tokens": 4, "temperature": 0}
            response = server.http.post(PATH, json=body).json()
            new = len(f"user: {text}\nassistant:")
            assert computed(response) == (new if before is None else 1 + len("\n") + new)
            before = response["id"]


@pytest.mark.parametrize(
    ("said", "text", "end"),
    [
        ("abc", "abc\n", 3),
        ("abc", " abc\n", 4),
        (" abc\n", "abc<eot>", 3),
        (" abc\n", "abc\n<eot>", 4),
        ("  abc", " abc", 4),
        ("", "anything", 0),
        ("abc", "ab", None),
        ("abc", "x abc", None),
        (" \n", "user:", None),
    ],
)
def test_what_was_said_is_found_in_a_text(said: str, text: str, end: int | None) -> None:
    assert end_of(said, f"before:{text}", len("before:")) == (None if end is None else end + len("before:"))
