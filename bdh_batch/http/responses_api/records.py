"""Responses that are stored, and turns that go on from them with the same tokens."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import orjson

from bdh_batch.backends.base import Backend
from bdh_batch.errors import BDHError
from bdh_batch.http.errors import NotFound
from bdh_batch.messages import Prompt, Text
from bdh_batch.store.record import Record, Records
from bdh_batch.text.tokenizer import decode

KIND = "response"


@dataclass(frozen=True, slots=True)
class Stored:
    """A response that is stored.

    Args:
        response: as it is returned.
        input: all items that it was made of, those of the turns before it included.
        length, digest: of the text that its tokens stand for, with what was generated; None where they do not.
    """

    response: dict[str, Any]
    input: Sequence[Mapping[str, Any]]
    length: int | None = None
    digest: str = ""
    tokens: Sequence[int] = ()

    @property
    def items(self) -> list[Mapping[str, Any]]:
        """What the next turn goes on from."""
        return [*self.input, *self.response["output"]]

    def record(self, owner: str) -> Record:
        body = {"response": self.response, "input": self.input, "length": self.length, "digest": self.digest}
        return Record(
            id=self.response["id"],
            kind=KIND,
            owner=owner,
            created=self.response["created_at"],
            parent=self.response["previous_response_id"],
            body=orjson.dumps(body),
            tokens=array("i", self.tokens).tobytes(),
        )

    @classmethod
    def of(cls, record: Record) -> Stored:
        return cls(**orjson.loads(record.body), tokens=array("i", record.tokens))


async def stored(records: Records, id: str, owner: str, param: str | None = None) -> Stored:
    """The response of that id. Raises NotFound: there is none, none any more, or it is somebody else's."""
    record = await records.get(KIND, id, owner) if id.startswith("resp_") else None
    if record is None:
        previous = param == "previous_response_id"
        what, code = ("Previous response", "previous_response_not_found") if previous else ("Response", "not_found")
        raise NotFound(f"{what} with id {id[:128]!r} not found.", param, code)
    return Stored.of(record)


async def resolved(records: Records, items: Sequence[dict[str, Any]], owner: str) -> list[Mapping[str, Any]]:
    """The items, with those that are referred to by their ids. Raises NotFound."""
    known: dict[str, Mapping[str, Mapping[str, Any]]] = {}
    found: list[Mapping[str, Any]] = []
    for index, item in enumerate(items):
        if item["type"] != "item_reference":
            found.append(item)
            continue
        id = str(item["id"])
        response = f"resp_{id.partition('_')[2].partition('_')[0]}"
        if response not in known:
            record = await records.get(KIND, response, owner)
            listed = () if record is None else Stored.of(record).items
            known[response] = {each["id"]: each for each in listed}
        if id not in known[response]:
            raise NotFound(f"Item with id {id[:128]!r} not found.", f"input[{index}].id", "not_found")
        found.append(known[response][id])
    return found


@dataclass(slots=True)
class Transcript:
    """The text of a conversation and its tokens, as far as they are known: those of a turn are kept for the next one.

    Args:
        before: the response that it goes on from.
    """

    before: Stored | None = None
    text: str = ""
    tokens: Sequence[int] = field(default=())

    async def tokenized(self, backend: Backend, text: Text, last: int | None) -> list[Prompt]:
        """The prompt of a text. Where it begins with the text of the response before, its tokens are that one's, as
        they were drawn, and those of the rest."""
        self.text = text.text
        before, length = self.before, None if self.before is None else self.before.length
        if before is None or length is None or not self._begins_as(before, length):
            prompts = await backend.tokenized([("input", text)], last)
        elif length == len(text.text):
            prompts = [Prompt(before.tokens, "input")]
        else:
            ends = tuple(end - length for end in text.ends if end > length)
            (rest,) = await backend.tokenized(
                [("input", replace(text, text=text.text[length:], add_special=False, ends=ends))]
            )
            known = len(before.tokens)
            breaks = (known, *(known + at for at in rest.breaks))
            prompts = [Prompt([*before.tokens, *rest.tokens], "input", breaks)]
        self.tokens = prompts[0].tokens
        return prompts

    def _begins_as(self, before: Stored, length: int) -> bool:
        return length <= len(self.text) and _digest(self.text[:length]) == before.digest

    def stored(
        self,
        response: dict[str, Any],
        input: Sequence[Mapping[str, Any]],
        generated: str,
        tokens: Sequence[int],
        backend: Backend,
    ) -> Stored:
        """The response with what the next turn needs.

        Tokens that were generated are those of the text only where they decode to it: not where a stop string or an
        end of text was left out. Then the next turn has those of the prompt.
        """
        if not self.text:
            return Stored(response, input)
        whole, known = self.text, list(self.tokens)
        for drawn in (tokens, tokens[:-1]):  # the last one may be an end of text, which a template writes itself
            if decode(backend.tokenizer, drawn, True)[0] == generated:
                whole, known = whole + generated, [*known, *drawn]
                break
        return Stored(response, input, len(whole), _digest(whole), known)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


async def is_put(records: Records, value: Stored, owner: str) -> bool:
    """Stores a response; returns whether that went well. The store counts and logs its failures."""
    try:
        await records.put(value.record(owner))
    except BDHError:
        return False
    return True
