"""After a start, the states of the responses that were used last are in memory before anyone asks for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from bdh_batch.http.auth.keys import Key
from bdh_batch.http.responses_api.stored.warming import namespace_of
from tests.http.test_response_states import DAMAGE, PATH, TEMPLATE, TINY, TOKENS, ask, computed
from tests.http.test_responses import text_of

if TYPE_CHECKING:
    from tests.conftest import ServeFactory

SCENE = "A scene with more than a few words, the {}."  # so many tokens that a prefix is shared


@pytest.mark.parametrize("sealed", [False, True])
def test_after_a_restart_the_next_turn_finds_its_state_although_its_file_is_gone(
    serve: ServeFactory, tmp_path: Path, sealed: bool
) -> None:
    (tmp_path / "template").write_text(TEMPLATE)
    options = [f"store.path={tmp_path / 'store'}", f"chat.template={tmp_path / 'template'}"]
    options += [f"store.encryption_key={'0' * 43}="] if sealed else []
    folder = tmp_path / "store" / "states"

    def last_turns(names: list[str]) -> dict[str, dict[str, Any]]:
        """One more turn of each, which is not stored."""
        return {name: ask_once(before[name], **salt.get(name, {})) for name in names}

    def ask_once(id: str, **more: Any) -> dict[str, Any]:
        body = {"input": "And then?", "previous_response_id": id, "max_output_tokens": TOKENS, "store": False}
        response: dict[str, Any] = server.http.post(PATH, json=body | {"temperature": 0} | more).json()
        return response

    salt = {"salted": {"cache_salt": "pepper"}}
    new = 1 + len("\nuser:And then?\nassistant:")  # the last token of the turn before has not been read
    with serve(*options, model=TINY) as server:
        damaged = ask(server, SCENE.format("damaged"))["id"]
        (file,) = folder.iterdir()
        first = ask(server, SCENE.format("first"))["id"]
        before = {"second": ask(server, "Go on, if you can.", first)["id"], "damaged": damaged}
        before["salted"] = ask(server, SCENE.format("salted"), **salt["salted"])["id"]
        expected = last_turns([*before])
        deleted = ask(server, SCENE.format("deleted"))["id"]
        assert server.http.delete(f"{PATH}/{deleted}").status_code == 200
        file.write_bytes(DAMAGE["tensor"](file.read_bytes()))
    with serve(*options, model=TINY) as server:
        server.until(lambda metrics: metrics["bdh_prefix_cache_states"] == 2)
        # The one that is damaged is counted and removed, as it would be at its turn.
        server.until(lambda metrics: metrics.get("bdh_store_failures_total{call=damaged}", 0) == 1)
        server.until(lambda metrics: metrics["bdh_store_states"] == 3)
        metrics = server.metrics()
        assert metrics["bdh_prefix_cache_states"] == 2
        counted = ("bdh_prefix_cache_queries_total", "bdh_prefix_cache_hits_total", "bdh_requests_total")
        assert not any(value for name, value in metrics.items() if name.startswith(counted))
        for kept in folder.iterdir():
            kept.unlink(missing_ok=True)
        # Prefixes are shared inside a salt: neither the turn without it nor a new request begins in that state.
        unsalted = ask_once(before["salted"], cache_salt="other")
        assert computed(unsalted) == unsalted["usage"]["input_tokens"]
        found = last_turns([*before])
        assert {name: text_of(turn) for name, turn in found.items()} == {
            name: text_of(turn) for name, turn in expected.items()
        }
        assert [computed(found[name]) for name in ("second", "salted")] == [new, new]
        assert computed(found["damaged"]) == found["damaged"]["usage"]["input_tokens"]


def test_states_are_read_for_callers_who_may_still_come() -> None:
    keys = {"0123": Key(sha256="0123" * 16)}
    owners = ("0123", "4567", "@local", "@89ab")
    assert [namespace_of(owner, keys) for owner in owners] == ["0123", None, None, None]
    assert [namespace_of(owner, {}) for owner in owners] == [None, None, "", ""]
