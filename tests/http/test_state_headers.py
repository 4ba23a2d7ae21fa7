"""The headers of state files, which are read and written in pieces."""

from __future__ import annotations

from array import array

import orjson
import pytest
from hypothesis import given, strategies as st

from bdh_batch.errors import InvalidRequest
from bdh_batch.http.states import header
from bdh_batch.http.states.header import LENGTH, MOST, Header

TENSOR = {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}
KNOWN = {"format": "1", "fingerprint": "f", "window": "0", "xxh3_128": "0" * 32}
TOKEN = st.integers(0, 2**31 - 1)


def with_tokens(text: str, count: int) -> Header:
    return Header({**KNOWN, "token_ids": text, "tokens": str(count)}, TENSOR, 24)


@given(st.lists(TOKEN, min_size=1) | st.integers(1, 30_000).map(lambda n: [7 * at for at in range(n)]))
def test_tokens_come_back_as_they_were(tokens: list[int]) -> None:
    assert with_tokens(header.written(tokens), len(tokens)).tokens() == array("i", tokens)
    assert (
        with_tokens(orjson.dumps(tokens, option=orjson.OPT_INDENT_2).decode(), len(tokens)).tokens()[-1] == tokens[-1]
    )


@given(st.lists(TOKEN, min_size=1))
def test_a_header_is_read_as_it_was_written(tokens: list[int]) -> None:
    read = array("i", tokens)
    encoded = with_tokens(header.written(tokens), len(tokens)).of_engine(read)
    length = header.length_in(encoded)
    assert (LENGTH + length) % 64 == 0
    assert len(encoded) == LENGTH + length
    found = header.parsed(encoded[LENGTH:])
    assert (found.read, found.fingerprint, found.size) == (len(tokens), "f", 24)
    assert found.metadata["tokens_sha256"] == header.digest(read)


@pytest.mark.parametrize("text", ["[5,-1,-2,-1]", "[0, -2,7,-1]"])
def test_latent_steps_are_read_as_tokens_are(text: str) -> None:
    tokens = orjson.loads(text)
    assert with_tokens(text, 4).tokens() == array("i", tokens)
    hidden = {"dtype": "F32", "shape": [3], "data_offsets": [24, 36]}
    encoded = Header({**KNOWN, "token_ids": text, "tokens": "4"}, TENSOR, 36, hidden).of_engine(array("i", tokens))
    found = header.parsed(encoded[LENGTH:])
    assert (found.size, found.hidden) == (36, hidden)
    for wrong in (b"[24,37]", b"[0,12]"):
        with pytest.raises(InvalidRequest, match="'hidden'"):
            header.parsed(encoded[LENGTH:].replace(b"[24,36]", wrong))


@given(st.binary(max_size=300) | st.recursive(st.none() | st.booleans() | st.text(), st.lists).map(orjson.dumps))
def test_what_is_no_header_is_refused(text: bytes) -> None:
    with pytest.raises(InvalidRequest) as refused:
        header.parsed(text)
    assert refused.value.param == "file"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[",
        "]",
        "[]",
        "1",
        "[1,]",
        "[,1]",
        "[1 2]",
        "[[1]]",
        "[1.5]",
        "[null]",
        "{}",
        "[true]",
        "[false,1]",
        "[-1]",
        "[1,-3]",
        "[1,-12]",
        "[1,--1]",
        "[1-1]",
        "[1e0]",
        '["1"]',
        "[4294967296]",
        "[\u0661]",
    ],
)
def test_what_is_no_list_of_tokens_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        with_tokens(text, 1).tokens()


def test_the_longest_list_of_tokens_is_read() -> None:
    text = "[" + "1," * (MOST // 4) + "1]"
    assert len(with_tokens(text, MOST // 4 + 1).tokens()) == MOST // 4 + 1


@pytest.mark.parametrize("part", [b"[],", b"{},", b'"",'])
def test_a_header_of_very_many_parts_is_not_even_parsed(part: bytes) -> None:
    with pytest.raises(InvalidRequest, match="too many parts"):
        header.parsed(b'{"__metadata__":{},"state":[' + part * (MOST // len(part) - 20) + b"0]}")


@pytest.mark.parametrize("key", ["shape", "data_offsets"])
def test_a_header_of_very_many_values_is_not_even_parsed(key: str) -> None:
    tensor = TENSOR | {key: [1] * (MOST // 2 - 200)}
    text = orjson.dumps({"__metadata__": KNOWN, "state": tensor})
    assert len(text) < MOST
    with pytest.raises(InvalidRequest, match="too many values"):
        header.parsed(text)


@pytest.mark.parametrize("character", ["[", "{", '"', "\\"])
def test_all_that_a_client_may_note_fits_into_a_header(character: str) -> None:
    noted = {f"{at:02}{character * 62}": character * 512 for at in range(16)}
    metadata = {"fingerprint": "f", "xxh3_128": "0" * 32, "metadata": orjson.dumps(noted).decode()}
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    found = header.parsed(orjson.dumps({"__metadata__": metadata, "state": tensor}))
    assert orjson.loads(found.metadata["metadata"]) == noted
