"""`client.states` and `bdh-batch state`, against a real server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from safetensors import safe_open

from bdh_batch.cli import main
from bdh_batch.client import AsyncBDHClient, BDHClient, InvalidRequest, NotFound, State

if TYPE_CHECKING:
    from tests.conftest import Cli, Server

TEXT, MORE = "Wherefore art", " thou"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 8}


@pytest.fixture(scope="module")
def client(tiny: Server) -> Iterator[BDHClient]:
    with BDHClient(tiny.url) as opened:
        yield opened


def said(client: BDHClient, prompt: str, **more: Any) -> str:
    return client.complete(prompt, **GREEDY, **more).choices[0].text


def test_states_are_saved_forked_listed_and_deleted(client: BDHClient) -> None:
    state = client.states.save(TEXT, metadata={"scene": "balcony"}, ttl=60)
    assert isinstance(state, State)
    assert (state.tokens, state.metadata, state.expires_at - state.created_at) == (len(TEXT), {"scene": "balcony"}, 60)
    fork = client.states.fork(state.id, ttl=30)
    assert client.states.load(fork.id) == fork
    assert client.states.list(limit=2) == [fork, state]
    assert client.states.list(limit=1, after=fork.id) == [state]
    client.states.delete(state.id)
    assert said(client, MORE, state=fork.id) == said(client, TEXT + MORE)
    with pytest.raises(NotFound):
        client.states.load(state.id)
    with pytest.raises(InvalidRequest) as refused:
        client.states.save()
    assert refused.value.param == "prompt"


def test_a_state_goes_through_a_file(client: BDHClient, tmp_path: Path) -> None:
    state = client.states.save(TEXT)
    client.states.download(state.id, tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert json.loads(file.metadata()["token_ids"]) == [*TEXT.encode()]
    copy = client.states.upload(tmp_path / "a.safetensors", ttl=60)
    assert copy.id != state.id
    assert said(client, MORE, state=copy.id) == said(client, TEXT + MORE)
    with pytest.raises(NotFound):
        client.states.download("st_0", tmp_path / "b")
    (tmp_path / "c").write_bytes(b"no state")
    with pytest.raises(InvalidRequest):
        client.states.upload(tmp_path / "c")
    assert {path.name for path in tmp_path.iterdir()} == {"a.safetensors", "c"}


async def test_the_same_with_asyncio(tiny: Server, tmp_path: Path) -> None:
    async with AsyncBDHClient(tiny.url) as client:
        state = await client.states.save(TEXT)
        await client.states.download(state.id, tmp_path / "a")
        copy = await client.states.upload(tmp_path / "a", model="tiny")
        fork = await client.states.fork(copy.id)
        asked: dict[str, Any] = {"return_token_ids": True, **GREEDY}
        begun = await client.complete(MORE, state=fork.id, **asked)
        assert begun.choices[0].text == (await client.complete(TEXT + MORE, **asked)).choices[0].text
        assert [each.id for each in await client.states.list(limit=3)] == [fork.id, copy.id, state.id]
        await client.states.delete(fork.id)
        with pytest.raises(NotFound):
            await client.states.load(fork.id)


def test_the_commands_carry_states_from_server_to_server(
    client: BDHClient, tiny: Server, cli: Cli, tmp_path: Path
) -> None:
    state = client.states.save(TEXT, metadata={"scene": "balcony"})
    server, file = ("--base-url", tiny.url), str(tmp_path / "a.safetensors")
    lines = cli("state", "list", *server).stdout.splitlines()
    assert lines[0].startswith(f"{state.id}  tiny  ")
    assert lines[0].endswith(f"{len(TEXT)} tokens  {state.bytes} bytes  scene=balcony")
    assert json.loads(cli("state", "list", "--json", *server).stdout.splitlines()[0])["id"] == state.id
    assert cli("state", "export", state.id, file, *server).returncode == 0
    id = cli("state", "import", file, "--ttl", "60", *server).stdout.strip()
    assert client.states.load(id).metadata == {"scene": "balcony"}
    failed = cli("state", "export", "st_0", file, *server)
    assert (failed.returncode, failed.stderr.count("\n")) == (1, 1)
    assert "not found" in failed.stderr


def test_what_is_no_id_names_nothing_else(client: BDHClient, tmp_path: Path) -> None:
    state = client.states.save(TEXT)
    for id in (f"../states/{state.id}", f"{state.id}/content", f"{state.id}?", f"{state.id}#", "", "..", "\n"):
        for ask in (client.states.load, client.states.delete, lambda id: client.states.download(id, tmp_path / "a")):
            with pytest.raises(InvalidRequest, match=r"^id: .* is not the id of a state"):
                ask(id)
    assert client.states.load(state.id) == state


@pytest.mark.parametrize(
    ("flag", "value", "problem"),
    [
        ("--base-url", "foo", "--base-url: should be as in http://127.0.0.1:8000, not 'foo'"),
        ("--base-url", "http://[", "--base-url: should be as in"),
        ("--base-url", "http://127.0.0.1:99999", "--base-url: should be as in"),
        ("--api-key", "kéy", "--api-key: has characters that are not visible ASCII"),
        ("--base-url", "http://127.0.0.1:1", "http://127.0.0.1:1/v1/states ("),
    ],
)
def test_the_commands_say_in_a_line_what_is_wrong(
    flag: str, value: str, problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["state", "list", flag, value]) in (1, 2)
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert problem in said
