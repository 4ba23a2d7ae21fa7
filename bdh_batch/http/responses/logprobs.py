"""Encodes logprobs in OpenAI's two shapes, columns for completions and a list of objects for chat, and in vLLM's for
those of a prompt.

A token is named by its text; where its bytes are no text, as `bytes:\\xf0`; where they are not known, by its id.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import islice
from typing import Any

import orjson

from bdh_batch.http.responses.json_pieces import between, in_pieces, one_list
from bdh_batch.messages import TokenLogprob
from bdh_batch.text.tokenizer import Tokenizer

Logprobs = Iterable[tuple[int, TokenLogprob]]  # each with where its token's text begins
Name = Callable[[int], tuple[str, Sequence[int] | None]]  # of a token: what it is called, and its bytes
PIECE = 512  # entries; each may have twenty more tokens in it
COLUMNS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


@lru_cache(2**16)
def known(tokenizer: Tokenizer, token: int) -> tuple[str, Sequence[int] | None]:
    """The token's name, and its bytes."""
    raw = tokenizer.token_bytes(token)
    if raw is None:
        return f"token_id:{token}", None
    try:
        return raw.decode(), tuple(raw)
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), tuple(raw)


def by_id(tokenizer: Tokenizer, token: int) -> tuple[str, Sequence[int] | None]:
    """As `known`, but that the name is the token's id, as all names are then."""
    return f"token_id:{token}", known(tokenizer, token)[1]


def columns(name: Name, first: Sequence[int], entries: Logprobs, most: int, base: int = 0) -> list[bytes]:
    """Encodes logprobs of completions, in pieces of JSON.

    A token is always among its own `top_logprobs`, which may be one more for it.

    Args:
        first: the token that nothing came before, and that has no logprob; or none.
        most: of the likeliest tokens that an entry has, so many are shown.
        base: where in the text the offsets of the entries begin.
    """
    encoded: list[list[bytes]] = [[] for _ in COLUMNS]
    if first:
        for column, value in zip(encoded, ([name(first[0])[0]], [None], [None], [0])):
            column.append(orjson.dumps(value))
    for piece in in_pieces(entries, PIECE):
        for column, values in zip(encoded, _columns(name, piece, most, base)):
            column.append(orjson.dumps(values))
    members = ([b'"%b":' % heading.encode(), *one_list(each)] for heading, each in zip(COLUMNS, encoded))
    return [b"{", *between(b",", members), b"}"]


def _columns(name: Name, entries: Logprobs, most: int, base: int) -> tuple[list[Any], ...]:
    names: list[str] = []
    logprobs: list[float] = []
    tops: list[dict[str, float]] = []
    offsets: list[int] = []
    for begin, entry in entries:
        own = name(entry.token)[0]
        top: dict[str, float] = {}
        for token, logprob in islice(entry.top, most):
            top.setdefault(name(token)[0], logprob)  # of several with one name, the likeliest
        top.setdefault(own, entry.logprob)
        names.append(own)
        logprobs.append(entry.logprob)
        tops.append(top)
        offsets.append(base + begin)
    return names, logprobs, tops, offsets


def objects(name: Name, entries: Logprobs) -> list[bytes]:
    """Encodes logprobs of chat, in pieces of JSON."""
    pieces = ([_with_top(name, entry) for _, entry in piece] for piece in in_pieces(entries, PIECE))
    return [b'{"content":', *one_list(map(orjson.dumps, pieces)), b',"refusal":null}']


def listed(name: Name, entries: Logprobs) -> bytes:
    """Encodes logprobs of responses: the items of a JSON list, without its brackets."""
    pieces = ([_with_top(name, entry) for _, entry in piece] for piece in in_pieces(entries, PIECE))
    return b",".join(orjson.dumps(piece)[1:-1] for piece in pieces)


def _with_top(name: Name, entry: TokenLogprob) -> dict[str, Any]:
    fields = _object(name, entry.token, entry.logprob)
    fields["top_logprobs"] = [_object(name, token, logprob) for token, logprob in entry.top]
    return fields


def _object(name: Name, token: int, logprob: float) -> dict[str, Any]:
    text, raw = name(token)
    return {"token": text, "logprob": logprob, "bytes": raw}


def of_prompt(tokenizer: Tokenizer, entries: Iterable[TokenLogprob], most: int) -> list[bytes]:
    """Encodes logprobs of a prompt's tokens as vLLM does, in pieces of JSON.

    An entry contains, by token id, the token itself and the likeliest; that of the first token is null. Tokens are
    named by their texts in any case, as entries have their ids.
    """
    pieces = ([_ranked(tokenizer, entry, most) for entry in piece] for piece in in_pieces(entries, PIECE))
    return one_list([b"[null]", *map(orjson.dumps, pieces)])


def _ranked(tokenizer: Tokenizer, entry: TokenLogprob, most: int) -> dict[str, Any]:
    found = [(entry.token, entry.logprob, entry.rank)]
    likeliest = islice(entry.top, most)
    found += [(token, logprob, rank) for rank, (token, logprob) in enumerate(likeliest, 1) if token != entry.token]
    return {
        str(token): {"logprob": logprob, "rank": rank, "decoded_token": known(tokenizer, token)[0]}
        for token, logprob, rank in found
    }
