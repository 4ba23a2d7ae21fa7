"""Tokenizers of Hugging Face's library: streamed, they say what it says, a token at a time."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
from hypothesis import given, settings, strategies as st
from tokenizers import AddedToken, decoders, normalizers

from bdh_batch.errors import CheckpointError
from bdh_batch.messages import Text
from bdh_batch.text.hugging_face import HuggingFaceTokenizer, load_hugging_face
from bdh_batch.text.pieces import UNSPELL
from bdh_batch.text.tokenizer import ByteTokenizer, decode
from tests.text.tokenizers import KINDS, byte_fallback, byte_level, words

HERE = Path("tokenizer.json")
RAW = {name: make() for name, make in KINDS.items()}
TOKENIZERS = {name: HuggingFaceTokenizer(raw, HERE) for name, raw in RAW.items()}
SPELT = {byte: character for character, byte in UNSPELL.items()}
EACH = pytest.mark.parametrize("kind", KINDS)
WRITING = st.text(st.sampled_from("the quickbrown, é世🙂'\n \u2581<>|")) | st.text(max_size=20)


def tokens_of(kind: str) -> st.SearchStrategy[list[int]]:
    """Any tokens, and some beyond the vocabulary, as a model whose own is padded draws them."""
    return st.lists(st.integers(0, TOKENIZERS[kind].size + 3), max_size=30)


def number(kind: str, name: str) -> int:
    token = TOKENIZERS[kind].token_id(name)
    assert token is not None
    return token


def plain(kind: str, token: int) -> bool:
    """Not a byte: the library makes of a run of them that is not UTF-8 as many U+FFFD as it has bytes."""
    return not TOKENIZERS[kind].name(token).startswith("<0x")


@EACH
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_tokens_streamed_are_what_the_library_decodes(kind: str, data: st.DataObject) -> None:
    tokens = [token for token in data.draw(tokens_of(kind)) if plain(kind, token)]
    assert decode(TOKENIZERS[kind], tokens)[0] == RAW[kind].decode(tokens)


@EACH
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_text_streamed_is_what_the_library_decodes(kind: str, data: st.DataObject) -> None:
    tokens = TOKENIZERS[kind].encode(data.draw(WRITING))
    assert decode(TOKENIZERS[kind], tokens)[0] == RAW[kind].decode(tokens)


@EACH
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_a_response_goes_on_where_its_prompt_ends(kind: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[kind]
    prompt, response = (tokenizer.encode(data.draw(WRITING), add_special=False) for _ in range(2))
    first, second = tokenizer.decoder(first=True), tokenizer.decoder()
    both = [*map(first.push, prompt), *map(second.push, response), second.flush()]
    shown = [token for token in prompt if tokenizer.name(token) not in tokenizer.special]
    if shown and kind != "end_of_word":  # there the space before a response is known only with the response
        assert "".join(both) == decode(tokenizer, [*prompt, *response])[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=20))
def test_bytes_are_shown_as_soon_as_their_character_is_complete(raw: list[int]) -> None:
    reference = ByteTokenizer().decoder()
    bytes_as_tokens: dict[str, list[int]] = {
        "byte_fallback": [number("byte_fallback", f"<0x{byte:02X}>") for byte in raw],
        "byte_level": [number("byte_level", SPELT[byte]) for byte in raw],
    }
    expected = [*map(reference.push, raw), reference.flush()]
    for kind, tokens in bytes_as_tokens.items():
        decoder = TOKENIZERS[kind].decoder()
        assert [*map(decoder.push, tokens), decoder.flush()] == expected


@EACH
def test_a_token_costs_the_same_however_many_came_before(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    tokens = tokenizer.encode("the quick brown fox é世🙂 to be", add_special=False)
    decoder = tokenizer.decoder()
    calls: list[int] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        calls[-1] += event in ("call", "c_call")

    for _ in range(200):
        calls.append(0)
        sys.setprofile(count)
        for token in tokens:
            decoder.push(token)
        sys.setprofile(None)
    assert len(set(calls[2:])) == 1
    assert sum(map(len, vars(decoder)["_tail"].decode())) <= 4


@EACH
def test_special_tokens_are_not_shown(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    end = tokenizer.token_id("<|im_end|>")
    assert end is not None
    tokens = tokenizer.encode("to be", add_special=False)
    assert decode(tokenizer, [end, *tokens, end])[0] == decode(tokenizer, tokens)[0]


def test_what_belongs_around_a_text_is_added_if_asked() -> None:
    for kind in ("byte_level", "byte_fallback"):
        tokenizer = TOKENIZERS[kind]
        begin = tokenizer.token_id("<s>")
        assert tokenizer.encode("the") == [begin, *tokenizer.encode("the", add_special=False)]
        assert tokenizer.encode_prompt(Text("the"))[0] == tokenizer.encode("the")


START, END = "\udc80", "\udc81"
STAND_INS = {START: "<|im_start|>", END: "<|im_end|>"}


@EACH
def test_what_stands_in_for_a_special_token_becomes_one_and_what_spells_one_does_not(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    start, end = (number(kind, name) for name in STAND_INS.values())
    text = f"{START}user\na <|im_end|> b{END}\n"
    for add_special in (False, True):
        tokens, _ = tokenizer.encode_prompt(Text(text, add_special, STAND_INS))
        assert [token for token in tokens if token in (start, end)] == [start, end]
    if kind == "byte_level":
        assert decode(tokenizer, [token for token in tokens if token not in (start, end)])[0].endswith(
            "user\na <|im_end|> b\n"
        )
    for harmless in ("a", f"{START}a{END}"):
        spelt = harmless.replace(START, "<|im_start|>").replace(END, "<|im_end|>")
        assert tokenizer.encode_prompt(Text(harmless, True, STAND_INS))[0] == tokenizer.encode(spelt)


def test_what_a_normalizer_makes_of_a_text_is_no_special_token_either() -> None:
    raw = byte_level()
    raw.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    raw.add_special_tokens([AddedToken("<|obey|>", normalized=True)])
    tokenizer = HuggingFaceTokenizer(raw, HERE)
    special = tokenizer.token_id("<|obey|>")
    for text in ("＜|obey|＞", "<|OBEY|>", "<|obey|>"):
        assert special in tokenizer.encode(text)
        assert special not in tokenizer.encode_prompt(Text(text, True, {}))[0]
    assert special in tokenizer.encode_prompt(Text("a\udc80", True, {"\udc80": "<|obey|>"}))[0]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([START, END, "<|im_end|>", "<|im_", "end|>", "the ", " fox", "\n", "é"])))
def test_only_stand_ins_become_special_tokens(parts: list[str]) -> None:
    for kind in ("byte_level", "word_piece"):
        tokenizer, text = TOKENIZERS[kind], "".join(parts)
        special = {token: number(kind, token) for token in STAND_INS.values()}
        expected = [special[STAND_INS[part]] for part in parts if part in STAND_INS]
        tokens, _ = tokenizer.encode_prompt(Text(text, False, STAND_INS))
        assert [token for token in tokens if token in special.values()] == expected
        if "<|im_end|>" not in text:
            spelt = "".join(STAND_INS.get(part, part) for part in parts)
            assert list(tokens) == list(tokenizer.encode(spelt, add_special=False))


def test_ends_of_messages_are_reported_as_positions() -> None:
    for tokenizer, text, stand_ins, ends in (
        (TOKENIZERS["byte_level"], "<|im_start|>é<|im_end|>the fox<|im_end|>", None, (23,)),
        (TOKENIZERS["byte_level"], f"{START}é{END}the fox{END}", STAND_INS, (3,)),
        (ByteTokenizer(), "é: the\nfox", None, (7,)),
    ):
        tokens, breaks = tokenizer.encode_prompt(Text(text, False, stand_ins, ends))
        (at,) = breaks
        head, _ = tokenizer.encode_prompt(Text(text[: ends[0]], False, stand_ins))
        assert list(tokens[:at]) == list(head)


@pytest.mark.parametrize(
    ("decoder", "kind"),
    [
        (decoders.CTC(), "CTC"),
        (decoders.Sequence([decoders.Fuse(), decoders.Replace("a", "b")]), "Replace"),
        (decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 0, 1)]), "Strip"),
        (decoders.Sequence([decoders.Replace("a", "b"), decoders.ByteLevel()]), "ByteLevel"),
    ],
)
def test_a_decoder_that_cannot_be_streamed_is_refused(decoder: decoders.Decoder, kind: str, tmp_path: Path) -> None:
    tokenizer = words()
    tokenizer.decoder = decoder
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(CheckpointError, match=kind) as error:
        load_hugging_face(tmp_path / "tokenizer.json")
    assert "tokenizer.json" in error.value.message


def test_truncation_and_padding_of_the_file_are_not_applied() -> None:
    for make in (byte_level, byte_fallback):
        raw = make()
        raw.enable_truncation(2)
        raw.enable_padding(length=50)
        assert len(HuggingFaceTokenizer(raw, HERE).encode("the quick brown", add_special=False)) > 2
        assert len(HuggingFaceTokenizer(raw, HERE).encode("t", add_special=False)) < 50
