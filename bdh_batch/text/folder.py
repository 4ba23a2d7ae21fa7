"""Reads from a model folder what concerns text: its tokenizer, its special tokens, its chat template.

Read before the weights, which take long, so that what cannot work is reported at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bdh_batch.errors import CheckpointError, ConfigError
from bdh_batch.system.documents import Malformed, brief, of_tokenizer, read_json_beside, read_text, unreadable
from bdh_batch.text.chat import TemplateSource
from bdh_batch.text.hugging_face import HuggingFaceTokenizer, load_hugging_face
from bdh_batch.text.tokenizer import BYTES, ByteTokenizer, TokenIdsOnly, Tokenizer

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS, GENERATION_CONFIG, MODEL_CONFIG = "special_tokens_map.json", "generation_config.json", "config.json"
CHAT_TEMPLATE = "chat_template.jinja"
NEWLINE = "\n"
Values = Mapping[str, Any]


@dataclass(frozen=True)
class TextComponents:
    """What turns a model's tokens into text and back: tokenizer, chat template, end-of-text tokens.

    Args:
        eos: tokens that end a text.
        names: of special tokens, such as `eos_token`, to their texts.
        origin: the file that is at fault where the tokenizer does not go with the model.
        declared: whether the folder names its tokenizer; else it follows from the size of the vocabulary.
    """

    tokenizer: Tokenizer
    template: TemplateSource
    eos: frozenset[int]
    names: Mapping[str, str]
    origin: Path
    declared: bool

    def info(self) -> dict[str, object]:
        """What /tokenizer_info reports."""
        return {
            "tokenizer_class": type(self.tokenizer).__name__,
            "bos_token": None,
            "eos_token": None,
            **self.names,
            "eos_token_ids": sorted(self.eos),
            **dict(zip(("prefix_token", "prefix_token_id"), self._prefix())),
        }

    def _prefix(self) -> tuple[str | None, int | None]:
        """Returns a token to put before a text whose logprobs are wanted, and its id: start, end or newline."""
        known = [self.names[name] for name in ("bos_token", "eos_token") if name in self.names]
        for text in (*known, NEWLINE):
            tokens = self._alone(text)
            if len(tokens) == 1:
                return text, tokens[0]
        return None, None

    def _alone(self, text: str) -> Sequence[int]:
        """The tokens of `text`; none where texts have none."""
        return () if isinstance(self.tokenizer, TokenIdsOnly) else self.tokenizer.encode(text, add_special=False)

    def fit(self, vocab_size: int) -> TextComponents:
        """For a model with a vocabulary of this size, which may be larger than the tokenizer's: some are padded.

        Raises:
            CheckpointError: the tokenizer has tokens that the model does not know.
        """
        tokenizer = _fitting(self.tokenizer if self.declared else None, self.origin, vocab_size)
        if beyond := sorted(token for token in self.eos if token >= vocab_size):
            text = f"eos_token_id {beyond[0]} is outside the model's vocabulary of {vocab_size}"
            raise CheckpointError(f"{self.origin.parent / GENERATION_CONFIG}: {text}")
        return replace(self, tokenizer=tokenizer)


def load_text(folder: Path, template: Path | None = None, parse_special: bool = False) -> TextComponents:
    """Reads what `folder` says; `TextComponents.fit` then looks whether it goes with the model.

    Args:
        template: a chat template instead of the folder's.
        parse_special: whether clients can write special tokens in messages.

    Raises:
        CheckpointError: a file that cannot be used.
        ConfigError: `template` cannot be read.
    """
    config = read_json_beside(of_tokenizer(folder, TOKENIZER_CONFIG))
    tokenizer, origin = _tokenizer(folder, config)
    names = _names(config, read_json_beside(of_tokenizer(folder, SPECIAL_TOKENS)))
    eos = frozenset(_eos(folder, names, tokenizer))
    guarded = () if parse_special or tokenizer is None else tokenizer.special
    chat = _template(folder, config, template, guarded, names)
    size = read_json_beside(folder / MODEL_CONFIG).get("vocab_size")
    components = TextComponents(tokenizer or TokenIdsOnly(), chat, eos, names, origin, tokenizer is not None)
    return components.fit(size) if isinstance(size, int) else components


def load_tokenizer(folder: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer alone, for a model with a vocabulary of this size.

    Raises:
        CheckpointError: it cannot be used, or does not go with the model.
    """
    return _fitting(*_tokenizer(folder, read_json_beside(of_tokenizer(folder, TOKENIZER_CONFIG))), vocab_size)


def _fitting(tokenizer: Tokenizer | None, origin: Path, vocab_size: int) -> Tokenizer:
    if tokenizer is None:
        return ByteTokenizer() if vocab_size == BYTES else TokenIdsOnly()
    if isinstance(tokenizer, ByteTokenizer) and vocab_size < BYTES:
        text = f"a byte tokenizer needs a vocabulary of {BYTES}; the model has {vocab_size}"
        raise CheckpointError(f"{origin}: {text}")
    if isinstance(tokenizer, HuggingFaceTokenizer) and vocab_size < tokenizer.size:
        text = f"its token ids go up to {tokenizer.size - 1}; the model has a vocabulary of {vocab_size}"
        raise CheckpointError(f"{origin}: {text}")
    return tokenizer


def _tokenizer(folder: Path, config: Values) -> tuple[Tokenizer | None, Path]:
    if (file := of_tokenizer(folder, TOKENIZER)).is_file():
        return load_hugging_face(file), file
    file = of_tokenizer(folder, TOKENIZER_CONFIG)
    if "type" not in config:
        return None, file
    if config["type"] != "byte":
        text = f'type is {brief(config["type"])}; "byte" is what can be served, or a {TOKENIZER} beside it'
        raise CheckpointError(f"{file}: {text}")
    return ByteTokenizer(), file


def _names(*sources: Values) -> dict[str, str]:
    """`bos_token`, `eos_token` and their like; the first source that has one says what it is."""
    names: dict[str, str] = {}
    for source in sources:
        for name, token in source.items():
            text = token.get("content") if isinstance(token, dict) else token
            if name.endswith("_token") and isinstance(text, str):
                names.setdefault(name, text)
    return names


def _eos(folder: Path, names: Mapping[str, str], tokenizer: Tokenizer | None) -> Iterator[int]:
    """What the tokenizer calls the end of a text, and what generation should end with."""
    name = names.get("eos_token")
    if name is not None and isinstance(tokenizer, HuggingFaceTokenizer):
        token = tokenizer.token_id(name)
        if token is None:
            raise CheckpointError(f"{folder / TOKENIZER_CONFIG}: eos_token {brief(name)} is not in {TOKENIZER}")
        yield token
    file = folder / GENERATION_CONFIG
    ids = read_json_beside(file).get("eos_token_id")
    for token in ids if isinstance(ids, list) else [] if ids is None else [ids]:
        if not isinstance(token, int) or isinstance(token, bool) or token < 0:
            raise CheckpointError(f"{file}: eos_token_id should be a token id or a list of them, not {brief(ids)}")
        yield token


def _template(
    folder: Path, config: Values, option: Path | None, special: Sequence[str], names: Mapping[str, str]
) -> TemplateSource:
    if option is not None:
        try:
            return TemplateSource(read_text(option), f"chat.template: {option}", special, names)
        except (OSError, Malformed) as error:
            raise ConfigError(f"chat.template: {option} cannot be read ({error})") from error
    if (file := of_tokenizer(folder, CHAT_TEMPLATE)).is_file():
        try:
            return TemplateSource(read_text(file), str(file), special, names)
        except (OSError, Malformed) as error:
            raise unreadable(file, error) from error
    file, found = of_tokenizer(folder, TOKENIZER_CONFIG), config.get("chat_template")
    if found is None:
        return TemplateSource(special=special, names=names)
    return TemplateSource(_source(found, file), f"{file}: chat_template", special, names)


def _source(found: object, file: Path) -> str:
    """One template, or the one called default of several."""
    if isinstance(found, str):
        return found
    named = found if isinstance(found, list) else []
    for each in named:
        if isinstance(each, dict) and each.get("name") == "default" and isinstance(each.get("template"), str):
            return str(each["template"])
    raise CheckpointError(f"{file}: chat_template should be a template, or a list of named ones with a default")
