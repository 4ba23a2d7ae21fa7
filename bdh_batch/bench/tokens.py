"""How texts are measured in tokens: by the server, by a tokenizer's file, by bytes, or by a guess that says so."""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Protocol

from tokenizers import Tokenizer

from bdh_batch.bench.outcome import Failed
from bdh_batch.errors import ConfigError

GUESSED_CHARACTERS = 4  # of English in a token of a common vocabulary
Ask = Callable[[str, str, Any], Awaitable[Any]]


class Tokens(Protocol):
    """Counts the tokens of a text."""

    name: str
    exact: bool

    async def count(self, text: str) -> int: ...

    async def cut(self, text: str, length: int) -> str:
        """The text of its first `length` tokens."""
        ...


class ByteTokens:
    """Counts bytes, for models whose tokens are bytes."""

    name, exact = "bytes", True

    async def count(self, text: str) -> int:
        return len(text.encode())

    async def cut(self, text: str, length: int) -> str:
        return text.encode()[:length].decode("utf-8", "ignore")


class GuessedTokens:
    """Guesses tokens from characters."""

    name, exact = f"guess: {GUESSED_CHARACTERS} characters", False

    async def count(self, text: str) -> int:
        return math.ceil(len(text) / GUESSED_CHARACTERS)

    async def cut(self, text: str, length: int) -> str:
        return text[: length * GUESSED_CHARACTERS]


class FileTokens:
    """Counts tokens by a tokenizer.json."""

    exact = True

    def __init__(self, path: Path) -> None:
        """`path` is a tokenizer.json, or the folder of one."""
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ConfigError(f"--tokenizer {path}: should be `bytes`, or a tokenizer.json or its folder")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # noqa: BLE001 - the library raises no other type
            raise ConfigError(f"--tokenizer {path}: {error}") from None
        self.name = str(path)

    async def count(self, text: str) -> int:
        return len(self._ids(text))

    async def cut(self, text: str, length: int) -> str:
        cut: str = self._tokenizer.decode(self._ids(text)[:length], skip_special_tokens=False)
        return cut

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids


class ServerTokens:
    """Counts tokens by the server's /tokenize."""

    name, exact = "the server's /tokenize", True

    def __init__(self, ask: Ask, model: str) -> None:
        self._ask = ask
        self._model = model

    async def count(self, text: str) -> int:
        return len(await self._ids(text))

    async def cut(self, text: str, length: int) -> str:
        body = {"model": self._model, "tokens": (await self._ids(text))[:length]}
        return str((await self._ask("POST", "/detokenize", body))["prompt"])

    async def _ids(self, text: str) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": False}
        ids: list[int] = (await self._ask("POST", "/tokenize", body))["tokens"]
        return ids


async def choose(tokenizer: str | None, ask: Ask, model: str, skip: bool) -> Tokens:
    """What --tokenizer names; else the server's, where it has one."""
    if tokenizer is not None:
        return ByteTokens() if tokenizer == "bytes" else FileTokens(Path(tokenizer))
    if skip:
        return GuessedTokens()
    server = ServerTokens(ask, model)
    try:
        await server.cut("a b", 1)
    except (Failed, KeyError, TypeError):
        return GuessedTokens()
    return server
