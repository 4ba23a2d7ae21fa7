"""What is remembered of recent completions: within limits, and whose it is."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator
from pathlib import Path

from hypothesis import given, strategies as st

from bdh_batch.http.responses_api.shared_events import SharedEvents
from bdh_batch.processes.folder import RuntimeFolder
from bdh_batch.processes.others import Others, answers_of_front_end
from bdh_batch.processes.questions import answer, ask
from bdh_batch.store.recent import TOKEN_BYTES, Completion, Recent


def completion(tokens: int = 1) -> Completion:
    return Completion("model", "salt", [5] * tokens, [7])


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xyz"), st.integers(0, 12))))
def test_limits_hold_and_the_last_is_there(added: list[tuple[str, str, int]]) -> None:
    recent = Recent(3, 10 * TOKEN_BYTES)
    for owner, id, tokens in added:
        recent.add(owner, id, completion(tokens))
        assert (recent.get(owner, id) is not None) == (tokens + 2 <= 10)
        found = [each for owner in "ab" for id in "xyz" if (each := recent.get(owner, id)) is not None]
        assert len(found) <= 3
        assert sum(each.size for each in found) <= 10 * TOKEN_BYTES


def test_a_flood_costs_nobody_else_what_is_remembered() -> None:
    recent = Recent(4)
    recent.add("me", "a", completion())
    for number in range(100):
        recent.add("you", str(number), completion())
    assert recent.get("me", "a") is not None
    assert recent.get("you", "a") is None
    assert recent.get("you", "99") is not None


def test_none_is_remembered_where_the_option_says_so() -> None:
    recent = Recent(0)
    recent.add("me", "a", completion())
    assert recent.get("me", "a") is None


async def test_another_process_is_asked(tmp_path: Path) -> None:
    folder, theirs, mine = RuntimeFolder(tmp_path), Recent(4), Recent(4)
    theirs.add("me", "a", completion(3))
    mine.join(Others(folder, "mine").completion)
    folder.questions("gone").touch()
    answers = answers_of_front_end(theirs, SharedEvents())
    async with await answer(folder.questions("theirs"), answers), await answer(folder.questions("other"), {}):
        found = await mine.find("me", "a")
        assert found is not None
        assert (found.model, found.salt, found.tokens()) == ("model", "salt", array("i", [5, 5, 5, 7]))
        assert await mine.find("you", "a") is None
        assert await mine.find("me", "x" * 100_000) is None
    assert await mine.find("me", "a") is None


async def test_an_answer_that_is_cut_short_is_none(tmp_path: Path) -> None:
    async def half() -> AsyncGenerator[bytes, None]:
        yield b"half of it"
        raise OSError("its process has ended")

    async def whole() -> AsyncGenerator[bytes, None]:
        yield b"all"
        yield b" of it"

    sockets = {name: tmp_path / name for name in ("half", "whole")}
    async with await answer(sockets["half"], {"it": half}), await answer(sockets["whole"], {"it": whole}):
        assert await ask(sockets, 60, "it") == {"whole": b"all of it"}
        assert await ask(sockets, 60, "something else") == {}
