"""States that are downloaded and uploaded: what comes back is what went, and what is none is refused."""

from __future__ import annotations

import json
import math
import resource
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest
from safetensors import safe_open
from xxhash import xxh3_128_hexdigest

from bdh_batch.http.states.header import MOST
from bdh_batch.http.states.objects import StateObject
from tests.conftest import eventually
from tests.support import ending_in

if TYPE_CHECKING:
    from tests.conftest import ServeFactory, Server

TINY = Path(__file__).parent.parent / "data" / "conformance" / "tiny"
PATH = "/v1/states"
CONTENT = f"{PATH}/content"
FILE = {"content-type": "application/octet-stream"}
TEXT, MORE = "ROMEO:\nBut soft! what light", " through yonder window"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
MOST_BYTES = 2**20
File = tuple[dict[str, Any], bytes]  # the header, and the tensor
KEYS = ("key-1-of-two", "key-2-of-two")


@pytest.fixture(scope="module")
def small(serve: ServeFactory) -> Iterator[Server]:
    """Bodies are small, files larger; there are two keys."""
    options = [f"store.max_state_bytes={MOST_BYTES}", "limits.max_body_bytes=20000", "limits.max_buffered_bytes=600000"]
    with serve(*options, "auth.enabled=true", f"auth.api_keys={json.dumps(KEYS)}", model=TINY) as server:
        server.http.headers["authorization"] = f"Bearer {KEYS[0]}"
        yield server


@pytest.fixture(scope="module")
def file(small: Server) -> bytes:
    state = small.http.post(PATH, json={"prompt": TEXT, "metadata": {"scene": "balcony"}}).json()
    return content(small, state["id"])


def content(server: Server, id: str) -> bytes:
    response = server.http.get(f"{PATH}/{id}/content")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == FILE["content-type"]
    assert int(response.headers["content-length"]) == len(response.content)
    return response.content


def upload(server: Server, file: bytes | Iterator[bytes], **query: Any) -> httpx.Response:
    return server.http.post(CONTENT, content=file, params=query, headers=FILE)


def refusal(server: Server, file: bytes | Iterator[bytes], status: int = 400, **query: Any) -> dict[str, Any]:
    return server.error(upload(server, file, **query), status)


def apart(file: bytes) -> File:
    length = int.from_bytes(file[:8], "little")
    return json.loads(file[8 : 8 + length]), file[8 + length :]


def together(header: Any, tensor: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + tensor


def changed(file: bytes, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> bytes:
    """The file with its header changed: the metadata, or the tensor's entry."""
    header, tensor = apart(file)
    change(header["__metadata__"], header["state"])
    return together(header, tensor)


class TestRoundTrip:
    def test_a_copy_is_a_safetensors_file_with_its_tokens(self, file: bytes, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(file)
        with safe_open(tmp_path / "a.safetensors", "numpy") as opened:
            metadata, tensor = opened.metadata(), opened.get_tensor("state")
        assert json.loads(metadata["token_ids"]) == [*TEXT.encode()]
        assert (metadata["model"], json.loads(metadata["metadata"])) == ("tiny", {"scene": "balcony"})
        assert metadata["xxh3_128"] == xxh3_128_hexdigest(tensor.tobytes())

    def test_what_comes_back_is_what_went(self, small: Server, file: bytes) -> None:
        response = upload(small, file, ttl=6000)
        assert response.status_code == 200, response.text
        state = StateObject.model_validate_json(response.content)
        assert (state.tokens, state.metadata) == (len(TEXT), {"scene": "balcony"})
        assert state.expires_at - state.created_at == 6000
        assert content(small, state.id) == file
        begun = small.complete(state=state.id, prompt=MORE, **GREEDY)
        assert begun["choices"][0]["text"] == small.text(prompt=TEXT + MORE, **GREEDY)
        assert begun["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(TEXT)

    def test_a_file_in_chunks_is_as_good(self, small: Server, file: bytes) -> None:
        state = upload(small, (file[at : at + 1000] for at in range(0, len(file), 1000))).json()
        assert content(small, state["id"]) == file

    def test_a_file_whose_header_takes_long_to_read_comes_whole(self, tiny: Server) -> None:
        state = tiny.http.post(PATH, json={"prompt": [97] * 30_000}).json()
        file = content(tiny, state["id"])
        for _ in range(3):
            copy = upload(tiny, file).json()
            assert (copy["tokens"], copy["model"]) == (30_000, "tiny")
        assert content(tiny, copy["id"]) == file

    def test_a_state_is_its_owners_alone(self, small: Server, file: bytes) -> None:
        id = upload(small, file).json()["id"]
        other = {"authorization": f"Bearer {KEYS[1]}"}
        for method, path in (("GET", ""), ("GET", "/content"), ("DELETE", "")):
            small.error(small.http.request(method, f"{PATH}/{id}{path}", headers=other), 404)
        assert small.http.get(PATH, headers=other).json()["data"] == []
        for path, body in (("/v1/completions", {"prompt": "a", "state": id}), (PATH, {"state": id})):
            assert small.error(small.http.post(path, json=body, headers=other), 404)["param"] == "state"
        assert small.http.get(f"{PATH}/{id}").status_code == 200

    def test_an_uploaded_state_is_a_prefix_of_no_other_request(self, small: Server, file: bytes) -> None:
        """It may be another one than that of its tokens: only who names it begins in it."""
        header, tensor = apart(file)
        other = (-np.frombuffer(tensor, np.float32)).tobytes()
        header["__metadata__"]["xxh3_128"] = xxh3_128_hexdigest(other)
        id = upload(small, together(header, other)).json()["id"]
        asked = {"prompt": TEXT + MORE, **GREEDY, "max_tokens": 20}
        before = small.text(**asked)
        begun = small.complete(state=id, **asked | {"prompt": MORE})["choices"][0]["text"]
        assert begun != before
        assert small.text(**asked) == before


HOSTILE: dict[str, Callable[[bytes], bytes]] = {
    "nothing": lambda file: b"",
    "no header": lambda file: file[:5],
    "no tensor": lambda file: together(apart(file)[0], b""),
    "cut off": lambda file: file[:-1],
    "more behind": lambda file: file + b"\0",
    "a header of half a gigabyte": lambda file: (2**29).to_bytes(8, "little") + file[8:],
    "a header of 2^64-1 bytes": lambda file: b"\xff" * 8 + file[8:],
    "no JSON": lambda file: (10).to_bytes(8, "little") + b"x" * 10,
    "deep JSON": lambda file: (4000).to_bytes(8, "little") + b"[" * 4000,
    "a list": lambda file: together([], b""),
    "no metadata": lambda file: together({"state": apart(file)[0]["state"]}, apart(file)[1]),
    "no state": lambda file: together({"__metadata__": apart(file)[0]["__metadata__"]}, b""),
    "two tensors": lambda file: together(apart(file)[0] | {"other": apart(file)[0]["state"]}, apart(file)[1]),
    "metadata that are numbers": lambda file: changed(file, lambda m, _: m.update(fingerprint=1)),
    "no fingerprint": lambda file: changed(file, lambda m, _: m.pop("fingerprint")),
    "another model's": lambda file: changed(file, lambda m, _: m.update(fingerprint="0" * 32)),
    "another window": lambda file: changed(file, lambda m, _: m.update(window="64")),
    "no checksum": lambda file: changed(file, lambda m, _: m.pop("xxh3_128")),
    "a wrong checksum": lambda file: changed(file, lambda m, _: m.update(xxh3_128="0" * 32)),
    "another dtype": lambda file: changed(file, lambda _, t: t.update(dtype="BF16", shape=[2, 2, 128, 64])),
    "an unknown dtype": lambda file: changed(file, lambda _, t: t.update(dtype="F64")),
    "a dtype that is none": lambda file: changed(file, lambda _, t: t.update(dtype=["F32"])),
    "another shape": lambda file: changed(file, lambda _, t: t.update(shape=[4, 1, 128, 32])),
    "a huge shape": lambda file: changed(file, lambda _, t: t.update(shape=[2**30] * 8)),
    "a negative shape": lambda file: changed(file, lambda _, t: t.update(shape=[-2, -2, 128, 32])),
    "a shape of truths": lambda file: changed(file, lambda _, t: t.update(shape=[True] * 3)),
    "lying offsets": lambda file: changed(file, lambda _, t: t.update(data_offsets=[0, 10])),
    "offsets before it": lambda file: changed(file, lambda _, t: t.update(data_offsets=[-8, 65528])),
    "no tokens": lambda file: changed(file, lambda m, _: m.pop("token_ids")),
    "tokens that are none": lambda file: changed(file, lambda m, _: m.update(token_ids='{"a": 1}')),
    "tokens that are text": lambda file: changed(file, lambda m, _: m.update(token_ids='["a"]')),
    "negative tokens": lambda file: changed(file, lambda m, _: m.update(token_ids="[-1]", tokens="1")),
    "huge tokens": lambda file: changed(file, lambda m, _: m.update(token_ids="[4294967296]", tokens="1")),
    "tokens of no vocabulary": lambda file: changed(
        file, lambda m, _: (m.update(token_ids="[70000]", tokens="1"), m.pop("tokens_sha256"))
    ),
    "tokens that are truths": lambda file: changed(
        file, lambda m, _: (m.update(token_ids="[true]", tokens="1"), m.pop("tokens_sha256"))
    ),
    "very many values": lambda file: changed(file, lambda _, t: t.update(shape=[1] * 2**15)),
    "fewer tokens": lambda file: changed(file, lambda m, _: m.update(token_ids="[82]")),
    "other tokens": lambda file: changed(file, lambda m, _: m.update(token_ids=str([82] * len(TEXT)))),
    "metadata that do not fit": lambda file: changed(file, lambda m, _: m.update(metadata='{"a": 1}')),
}


class TestHostile:
    @pytest.mark.parametrize("kind", HOSTILE)
    def test_what_is_no_state_is_refused(self, small: Server, file: bytes, kind: str) -> None:
        error = refusal(small, HOSTILE[kind](file))
        assert (error["param"], error["code"]) == ("file", "invalid_state")
        assert refusal(small, iter([HOSTILE[kind](file)]))["param"] == "file"  # its length is not known before

    @pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
    def test_numbers_that_are_not_finite_are_refused(self, small: Server, file: bytes, number: float) -> None:
        error = refusal(small, ending_in(file, number))
        assert (error["param"], error["code"]) == ("file", "invalid_state")
        assert "finite" in error["message"]

    def test_numbers_from_which_nothing_finite_comes_are_refused(self, small: Server, file: bytes) -> None:
        header, tensor = apart(file)
        numbers = np.full(len(tensor) // 4, np.finfo(np.float32).max, np.float32)
        header["__metadata__"]["xxh3_128"] = xxh3_128_hexdigest(numbers.tobytes())
        error = refusal(small, together(header, numbers.tobytes()))
        assert (error["param"], error["code"]) == ("file", "invalid_state")

    def test_nothing_of_them_is_stored(self, small: Server, file: bytes) -> None:
        def held() -> tuple[float, ...]:
            metrics = small.metrics()
            return tuple(metrics[f"bdh_store_{name}"] for name in ("records", "states", "bytes"))

        before = held()
        for damage in HOSTILE.values():
            refusal(small, damage(file))
        assert held() == before

    @pytest.mark.parametrize(
        ("query", "param", "status"),
        [({"ttl": "x"}, "ttl", 400), ({"model": "x"}, "model", 404), ({"name": "x"}, "name", 400)],
    )
    def test_bad_queries_are_refused_by_name(
        self, small: Server, file: bytes, query: dict[str, str], param: str, status: int
    ) -> None:
        assert refusal(small, file, status, **query)["param"] == param

    @pytest.mark.parametrize(
        ("method", "path"), [("POST", ""), ("GET", ""), ("GET", "/st_1"), ("GET", "/st_1/content"), ("DELETE", "/st_1")]
    )
    def test_unknown_queries_are_refused_by_name(self, small: Server, method: str, path: str) -> None:
        response = small.http.request(method, f"{PATH}{path}", params={"order": "asc"})
        error = small.error(response, 400)
        assert (error["param"], error["code"]) == ("order", "unknown_parameter")

    @pytest.mark.parametrize(
        "headers",
        [
            {"content-type": "application/json"},
            {"content-type": "multipart/form-data; boundary=x"},
            {"content-type": "text/plain"},
            FILE | {"content-encoding": "gzip"},
        ],
    )
    def test_only_files_are_taken_as_they_are(self, small: Server, file: bytes, headers: dict[str, str]) -> None:
        small.error(small.http.post(CONTENT, content=file, headers=headers), 415)


def begun(server: Server, content: bytes, length: int | None = None) -> socket.socket:
    """A connection on which an upload has begun, of so many bytes or of chunks, and does not go on."""
    how = "transfer-encoding: chunked" if length is None else f"content-length: {length}"
    head = f"POST {CONTENT} HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {KEYS[0]}\r\n{how}\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", server.port))
    body = content if length is not None else b"%x\r\n%b\r\n" % (len(content), content)
    connection.sendall(head.encode() + body)
    return connection


def to_end_of_json(connection: socket.socket) -> bytes:
    """A response whose body is an object, though it comes in pieces."""
    received = b""
    while not received.endswith(b"}") and (got := connection.recv(4096)):
        received += got
    return received


class TestSize:
    def test_one_that_is_too_large_is_refused_by_its_length(self, small: Server) -> None:
        with begun(small, b"", MOST_BYTES + 1) as connection:
            received = to_end_of_json(connection)
        assert received.startswith(b"HTTP/1.1 413")
        assert b"store.max_state_bytes" in received

    def test_one_that_is_too_large_by_its_header_is_refused_by_that(self, small: Server, file: bytes) -> None:
        header, _ = apart(file)
        header["state"] |= {"shape": [2**20], "data_offsets": [0, 2**22]}
        for content in (together(header, b""), MOST.to_bytes(8, "little")):
            with begun(small, content) as connection:
                received = to_end_of_json(connection)
            assert received.startswith(b"HTTP/1.1 413")
            assert b"store.max_state_bytes" in received

    def test_one_with_more_behind_it_is_refused_before_the_end(self, small: Server, file: bytes) -> None:
        with begun(small, file + b"more") as connection:
            assert to_end_of_json(connection).startswith(b"HTTP/1.1 400")

    def test_files_count_for_no_more_memory_than_is_held_of_them(self, serve: ServeFactory, file: bytes) -> None:
        """One is larger than all bodies may be together."""
        with serve("limits.max_body_bytes=10000", "limits.max_buffered_bytes=40000", model=TINY) as server:
            assert upload(server, file).status_code == 200

    @pytest.mark.parametrize(
        "change",
        [
            lambda m, _: m.update(fingerprint="0" * 32),
            lambda m, _: m.update(window="64"),
            lambda _, t: t.update(shape=[4, 1, 128, 32]),
            lambda _, t: t.update(dtype="BF16", shape=[2, 2, 128, 64]),
        ],
    )
    def test_one_of_another_model_or_layout_is_refused_by_its_header(
        self, small: Server, file: bytes, change: Callable[[dict[str, str], dict[str, Any]], object]
    ) -> None:
        whole = changed(file, change)
        head = whole[: -len(apart(file)[1])]
        with begun(small, head, len(whole)) as connection:
            received = to_end_of_json(connection)
        assert received.startswith(b"HTTP/1.1 400")
        assert b"invalid_state" in received

    def test_clients_that_leave_or_stay_take_no_others_turn(self, small: Server, file: bytes) -> None:
        for _ in range(20):  # more than may come at a time
            begun(small, file[:40_000], len(file)).close()
        eventually(lambda: upload(small, file).status_code == 200)
        waiting = [begun(small, file[:40_000], len(file)) for _ in range(5)]
        eventually(lambda: small.metrics()["bdh_http_requests_in_flight"] >= 5)  # four, and the scrape
        refused = upload(small, file)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
        for connection in waiting:
            connection.close()
        eventually(lambda: upload(small, file).status_code == 200)


def test_a_full_disk_harms_no_response(serve: ServeFactory, tmp_path: Path) -> None:
    """Files of the server cannot grow beyond a size, as on a disk that is full."""
    with serve(f"store.path={tmp_path}", model=TINY, cutting=True) as server:
        file = content(server, server.http.post(PATH, json={"prompt": TEXT}).json()["id"])
        said = server.text(prompt=TEXT, **GREEDY)

        def full(size: int) -> None:
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

        full(len(file) // 2)
        error = server.error(server.http.post(PATH, json={"prompt": MORE}), 503)
        assert "could not be saved" in error["message"]
        assert refused(server, file) == (500, "store_failed")
        assert server.metrics()["bdh_store_failures_total{call=save}"] == 1
        full(1)
        response = server.http.post("/v1/responses", json={"input": "a", "max_output_tokens": 3}).json()
        assert (response["status"], response["store"]) == ("incomplete", False)
        assert server.text(prompt=TEXT, **GREEDY) == said
        assert sum(value for name, value in server.metrics().items() if name.startswith("bdh_store_failures")) >= 2
        full(resource.RLIM_INFINITY)
        assert upload(server, file).status_code == 200
        assert len(list((tmp_path / "states").iterdir())) == 2
        (tmp_path / "work").rename(tmp_path / "away")
        response = server.http.post("/v1/responses", json={"input": "a", "max_output_tokens": 3}).json()
        assert (response["status"], response["store"]) == ("incomplete", True), "its tokens make its state again"
        server.until(lambda metrics: metrics["bdh_store_failures_total{call=save}"] == 2)
        (tmp_path / "away").rename(tmp_path / "work")


def test_a_folder_that_cannot_be_used_any_more_harms_no_response(serve: ServeFactory, tmp_path: Path) -> None:
    """A file is in the place of the folder of states: root could write in one that is read-only."""
    folder, away = tmp_path / "states", tmp_path / "away"
    with serve(f"store.path={tmp_path}", model=TINY) as server:

        def turn(before: str | None = None) -> dict[str, Any]:
            asked = {"input": "a", "max_output_tokens": 3, "temperature": 0, "previous_response_id": before}
            response: dict[str, Any] = server.http.post("/v1/responses", json=asked).json()
            assert (response["status"], response["store"]) == ("incomplete", True)
            return response

        def said() -> tuple[Any, str]:
            (item,) = turn(first)["output"]
            return item["content"], server.text(state=id, prompt=MORE, **GREEDY)

        id = server.http.post(PATH, json={"prompt": TEXT}).json()["id"]
        file, first = content(server, id), turn()["id"]
        server.until(lambda metrics: metrics["bdh_store_states"] == 2)
        expected = said()
        server.until(lambda metrics: metrics["bdh_store_states"] == 3)
        folder.rename(away)
        folder.touch()
        assert refused(server, file) == (500, "store_failed")
        error = server.http.post(PATH, json={"prompt": MORE}).json()["error"]
        assert (error["code"], str(tmp_path) in error["message"]) == ("store_failed", False)
        assert said() == expected
        server.until(lambda metrics: metrics["bdh_store_failures_total{call=adopt}"] >= 3)
        folder.unlink()
        away.rename(folder)
        assert upload(server, file).status_code == 200
        assert said() == expected
        server.until(lambda metrics: metrics["bdh_store_states"] == 5 == len([*folder.iterdir()]))


def refused(server: Server, file: bytes) -> tuple[int, str]:
    response = upload(server, file)
    return response.status_code, response.json()["error"]["code"]
