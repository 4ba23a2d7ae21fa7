"""A conversation at the terminal: what has been said, how it goes on, and its file."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import orjson

from bdh_batch.errors import InvalidRequest
from bdh_batch.llm.llm import LLM, Pieces
from bdh_batch.llm.outputs import Message
from bdh_batch.llm.params import SamplingParams

KIND = "bdh-batch conversation"
FIELDS = {each.name for each in fields(SamplingParams)} - {"n", "prompt_logprobs", "logprobs"}  # that may be set


@dataclass
class Session:
    """What has been said, and what is set.

    Args:
        is_chat: whether the model has a chat template; else its texts are continued.
        given: the sampling parameters that were set.
    """

    llm: LLM
    is_chat: bool
    system: str = ""
    turns: list[dict[str, str]] = field(default_factory=list)
    given: dict[str, Any] = field(default_factory=dict)

    @property
    def params(self) -> SamplingParams:
        """Those that hold. A response is as long as a server's by default, and not as vLLM's, of 16 tokens."""
        return replace(self.llm.get_default_sampling_params(), **{"max_tokens": None} | self.given)

    def set(self, name: str, value: Any) -> None:
        """Sets a sampling parameter; None has it be the default again. Raises InvalidRequest."""
        if name not in FIELDS:
            raise InvalidRequest(f"{name}: there is no such parameter; there are {', '.join(sorted(FIELDS))}.", name)
        if value is None:
            self.given.pop(name, None)
            return
        self.llm.check(replace(self.params, **{name: value}))
        self.given[name] = value

    def respond(self, text: str) -> Generator[str, None, None]:
        """What the model responds, piece by piece; as far as it is read, it has been said then. Raises BDHError."""
        said: list[str] = []
        turn = {"role": "user", "content": text}
        pieces = self._stream(turn)
        try:
            for piece in pieces:
                said.append(piece.text)
                yield piece.text
        finally:
            pieces.close()
            if said:
                self.turns += [turn, {"role": "assistant", "content": "".join(said)}]

    def clear(self) -> None:
        """Forgets what has been said, but not what is set."""
        self.turns.clear()

    def save(self, path: Path) -> None:
        """Writes it to a file. Raises OSError."""
        known: dict[str, Any] = {"kind": KIND, "model": self.llm.model_name, "system": self.system}
        known |= {"parameters": self.given, "turns": self.turns}
        path.write_bytes(orjson.dumps(known, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE))

    def load(self, path: Path) -> None:
        """Goes on from a file. Raises OSError; InvalidRequest: it is no conversation."""
        try:
            known = orjson.loads(path.read_bytes())
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(f"{path}: is no JSON: {error}", "file") from error
        turns = known.get("turns") if isinstance(known, dict) and known.get("kind") == KIND else None
        if not (isinstance(turns, list) and all(map(_is_turn, turns)) and isinstance(known.get("system"), str)):
            raise InvalidRequest(f"{path}: is no conversation that /save has written", "file")
        parameters = known.get("parameters")
        other = Session(self.llm, self.is_chat)
        for name, value in (parameters if isinstance(parameters, dict) else {}).items():
            other.set(name, value)
        self.system, self.turns, self.given = known["system"], turns, other.given

    def _stream(self, turn: Mapping[str, str]) -> Pieces:
        if self.is_chat:
            system: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
            return self.llm.stream([*system, *self.turns, turn], self.params)
        before = "".join(each["content"] + "\n" * (each["role"] == "assistant") for each in self.turns)
        return self.llm.stream(before + turn["content"], self.params)


def _is_turn(value: object) -> bool:
    return isinstance(value, dict) and value.keys() == {"role", "content"} and {str} == set(map(type, value.values()))


def shown(session: Session) -> str:
    """What holds, for people."""
    given = {name: value for name, value in asdict(session.params).items() if value is not None}
    rows = [("model", session.llm.model_name), ("mode", "chat" if session.is_chat else "completion")]
    rows += [("system", session.system)] if session.system else []
    rows.append(("turns", str(len(session.turns) // 2)))
    rows += [(name, f"{value}{'  (set)' * (name in session.given)}") for name, value in given.items()]
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    return "\n".join(lines)
