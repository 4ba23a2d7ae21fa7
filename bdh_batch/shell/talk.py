"""`bdh-batch run`: talks to a model at the terminal, or responds to the lines of a pipe."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from bdh_batch.errors import BDHError, InvalidRequest
from bdh_batch.llm.llm import LLM
from bdh_batch.settings import Settings
from bdh_batch.shell.session import Session, shown

ASKING, GOING_ON, QUOTES = ">>> ", "... ", '"""'
# What a terminal would obey, and no text needs.
CONTROL = {code: "\ufffd" for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"}


class Leave(Exception):
    """Ends the conversation."""


def talk(settings: Settings, prompt: str | None) -> int:
    """Responds until there is nothing more to respond to, and returns the exit code: 1 where something could not be
    responded to that nobody had typed in.

    Args:
        prompt: what is to be responded to, and nothing else; None: the lines of the input.

    Raises ConfigError, CheckpointError: the model cannot be loaded.
    """
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        with LLM.of(settings) as llm:
            terminal = Terminal(Session(llm, llm.has_chat_template))
            return terminal.once(prompt) if prompt is not None else terminal.run()
    except BrokenPipeError:  # nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


class Terminal:
    """Reads what is typed, and writes what the model responds."""

    def __init__(self, session: Session) -> None:
        self._session = session
        # A program may be started without either.
        self._is_terminal = all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout))
        self._failed = False

    def once(self, prompt: str) -> int:
        """Responds to `prompt`."""
        self._handled(prompt, self._respond)
        return int(self._failed)

    def run(self) -> int:
        """Responds to lines until there are no more, or one says so."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):  # a system without it has its own way to edit lines
                import readline  # noqa: F401 - `input` uses it from now on
            kind = "chat" if self._session.is_chat else "it continues texts: the model has no chat template"
            print(f"{self._session.llm.model_name} ({kind}). /help shows the commands, Ctrl-D ends.")
        with contextlib.suppress(EOFError, Leave):
            while True:
                try:
                    self._handle(self._read())
                except KeyboardInterrupt:
                    if not self._is_terminal:
                        raise
                    print("\nCtrl-D or /bye ends.")
        return int(self._failed and not self._is_terminal)

    def _read(self) -> str:
        """The next text. Between two lines that begin and end with three quotes, it may have several.

        Raises EOFError.
        """
        text = self._line(ASKING)
        if not text.startswith(QUOTES):
            return text
        text = text.removeprefix(QUOTES)
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + self._line(GOING_ON)
        return text.rstrip().removesuffix(QUOTES)

    def _line(self, asking: str) -> str:
        if self._is_terminal:
            return input(asking)
        line = "" if sys.stdin is None else sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    def _handle(self, text: str) -> None:
        word, _, rest = text.partition(" ")
        if word.startswith("/") and "\n" not in text:
            self._handled(rest.strip(), COMMANDS[word].run if word in COMMANDS else _unknown, self._session)
        elif text.strip():
            self._handled(text, self._respond)

    def _handled(self, given: str, how: Callable[..., None], *known: Session) -> None:
        """Says what is wrong, if something is."""
        try:
            how(*known, given)
        except (BDHError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            self._failed = True
            print(f"bdh-batch: {error}", file=sys.stderr, flush=True)

    def _respond(self, text: str) -> None:
        with contextlib.closing(self._session.respond(text)) as pieces:
            try:
                for piece in pieces:
                    print(piece.translate(CONTROL) if self._is_terminal else piece, end="", flush=True)
            except KeyboardInterrupt:
                if not self._is_terminal:
                    raise
        print(flush=True)


@dataclass(frozen=True, slots=True)
class Command:
    """What a line that begins with `/` does."""

    usage: str
    help: str
    run: Callable[[Session, str], None]


def _set(session: Session, given: str) -> None:
    name, _, text = given.partition(" ")
    if not name:
        print(shown(session))
        return
    session.set(name, _value(text.strip()))


def _value(text: str) -> Any:
    """JSON, or else a text; nothing is None."""
    if not text:
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return text


def _latent(session: Session, given: str) -> None:
    session.set("latent_steps", _value(given))


def _system(session: Session, given: str) -> None:
    if not session.is_chat:
        raise InvalidRequest("/system: the model has no chat template, and so no system message", "/system")
    session.system = given


def _show(session: Session, given: str) -> None:
    print(shown(session))


def _save(session: Session, given: str) -> None:
    session.save(_path(given, "/save"))
    print(f"saved: {given}")


def _load(session: Session, given: str) -> None:
    session.load(_path(given, "/load"))
    print(f"loaded: {given}, {len(session.turns) // 2} turns")


def _path(given: str, command: str) -> Path:
    if not given:
        raise InvalidRequest(f"{command} FILE: which file?", command)
    return Path(given).expanduser()


def _clear(session: Session, given: str) -> None:
    session.clear()


def _help(session: Session, given: str) -> None:
    width = max(len(each.usage) for each in COMMANDS.values())
    print("\n".join(f"{each.usage:<{width}}  {each.help}" for each in dict.fromkeys(COMMANDS.values())))
    print('Ctrl-C stops a response, Ctrl-D ends. """ begins and ends a text of several lines.')


def _bye(session: Session, given: str) -> None:
    raise Leave


def _unknown(session: Session, given: str) -> None:
    raise InvalidRequest("there is no such command; /help shows those that there are")


_leave = Command("/bye", "end", _bye)
COMMANDS: Mapping[str, Command] = {
    "/set": Command(
        "/set NAME VALUE", "set a sampling parameter, as in /set temperature 0.7; without VALUE: unset", _set
    ),
    "/latent": Command(
        "/latent N", "set how many latent steps come before each response; without N: the default", _latent
    ),
    "/system": Command("/system TEXT", "set the system message; without TEXT: none", _system),
    "/show": Command("/show", "show what is set", _show),
    "/save": Command("/save FILE", "write the conversation to a file", _save),
    "/load": Command("/load FILE", "go on from such a file", _load),
    "/clear": Command("/clear", "forget what has been said", _clear),
    "/help": Command("/help", "show this", _help),
    **dict.fromkeys(("/bye", "/exit", "/quit"), _leave),
}
