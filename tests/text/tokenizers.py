"""Small tokenizers of every kind that there is, trained here."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = ["the quick brown fox jumps over the lazy dog", "naïve café – 世界 🙂 don't", "to be, or not to be: that"] * 4
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]


def byte_level() -> Tokenizer:
    """As GPT-2, Llama 3 and Qwen have it: a character may be spread over tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=alphabet, special_tokens=SPECIAL, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_tokens([AddedToken("<think> it"), AddedToken("</think>")])
    return begin_with(tokenizer, "<s>")


def byte_fallback() -> Tokenizer:
    """As Llama 2's from sentencepiece: unknown characters as <0xXX>, a space before the first word."""
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["▁", *"thequickbrown", "th", "▁th", "▁the", "é", "▁▁"]
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(["<unk>", *SPECIAL, *bytes_, *words]))}
    merges = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    tokenizer.add_special_tokens(SPECIAL)
    return begin_with(tokenizer, "<s>")


def metaspace() -> Tokenizer:
    """As T5 and XLM-R: Unigram, the space before a word is part of it."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=120, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_piece() -> Tokenizer:
    """As BERT: what continues a word begins with ##."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["[UNK]", *SPECIAL], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def end_of_word() -> Tokenizer:
    """As the first GPT: what ends a word ends with </w>, so a space depends on what follows."""
    tokenizer = Tokenizer(models.BPE(unk_token="[UNK]", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    trainer = trainers.BpeTrainer(
        vocab_size=160, special_tokens=["[UNK]", *SPECIAL], end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def words() -> Tokenizer:
    """Whole words, and no decoder at all."""
    vocabulary = {word: number for number, word in enumerate(["[UNK]", *SPECIAL, "to", "be", "or", "not"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def begin_with(tokenizer: Tokenizer, token: str) -> Tokenizer:
    number = tokenizer.token_to_id(token)
    tokenizer.post_processor = processors.TemplateProcessing(f"{token} $A", special_tokens=[(token, number)])
    return tokenizer


KINDS: dict[str, Callable[[], Tokenizer]] = {
    each.__name__: each for each in (byte_level, byte_fallback, metaspace, word_piece, end_of_word, words)
}
