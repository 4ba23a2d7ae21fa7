"""Writes what was found as JSON, and as an HTML page that needs nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from typing import Any, NamedTuple

import numpy as np
import orjson

STYLE = """\
:root { color-scheme: light dark; --line: color-mix(in srgb, currentColor 20%, transparent); }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 64rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-bottom: 1px solid var(--line); margin-top: 2.5rem; }
h3 { font-size: 15px; margin: 1.2rem 0 .2rem; }
small { font-weight: normal; opacity: .7; }
td, th { border-top: 1px solid var(--line); padding: .15rem .8rem .15rem 0; text-align: left; vertical-align: top; }
td:first-child { white-space: nowrap; text-align: right; }
code { font: 13px/1.5 ui-monospace, monospace; white-space: pre-wrap; }
mark { border-radius: 3px; }
"""
POLICY = "default-src 'none'; style-src 'unsafe-inline'"
SHOWN = str.maketrans(
    {"\n": "⏎", "\r": "␍", "\t": "⇥"} | {chr(code): "\ufffd" for code in range(32) if code not in (9, 10, 13)}
)


class Context(NamedTuple):
    """A place in the text where a neuron fired."""

    position: int  # of the token
    byte: int  # where it begins
    value: float
    before: str
    token: str
    after: str


class Found(NamedTuple):
    """A neuron that fired, and where it fired most."""

    layer: int
    head: int
    neuron: int
    active: float  # the share of tokens that it fired for
    contexts: Sequence[Context]

    def as_dict(self) -> dict[str, Any]:
        return self._asdict() | {"contexts": [context._asdict() for context in self.contexts]}


class TokenText:
    """The text as the tokens have it, of which it shows what is around one of them.

    Args:
        pieces: the bytes of each token.
        around: bytes before a token that are shown; after it come half as many.
    """

    def __init__(self, pieces: Iterable[bytes], around: int) -> None:
        sizes, parts = [], []
        for piece in pieces:
            sizes.append(len(piece))
            parts.append(piece)
        self.bytes = b"".join(parts)
        self._ends = np.cumsum(np.array(sizes, np.int64))
        self._around = around

    def at(self, byte: int) -> int:
        """The position of the token that has the byte at this offset."""
        return int(np.searchsorted(self._ends, byte, side="right"))

    def context(self, position: int, value: float) -> Context:
        begin, end = int(self._ends[position - 1]) if position else 0, int(self._ends[position])
        before = self.bytes[max(0, begin - self._around) : begin]
        after = self.bytes[end : end + self._around // 2]
        # Characters that are cut at the edges are left out; of a token that is a part of one, it is shown.
        shown = before.decode(errors="ignore"), self.bytes[begin:end].decode(errors="replace")
        return Context(position, begin, value, *shown, after.decode(errors="ignore"))


def json_lines(facts: dict[str, Any], neurons: Iterable[Found]) -> Iterator[bytes]:
    """One JSON document, with a line for each neuron."""
    yield orjson.dumps(facts)[:-1] + b',"neurons":[\n'
    comma = b""
    for found in neurons:
        yield comma + orjson.dumps(found.as_dict())
        comma = b",\n"
    yield b"\n]}\n"


def page(facts: dict[str, Any], neurons: Sequence[Found]) -> str:
    """The page of some of them; all that comes from the text, or from names, is escaped."""
    title = f"Neurons of {facts['model']}"
    words = "".join(_word(word) for word in facts["words"])
    layers = sorted({found.layer for found in neurons})
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
        f'<meta http-equiv="content-security-policy" content="{POLICY}"><style>{STYLE}</style></head><body>',
        f"<h1>{escape(title)}</h1><p>{facts['tokens']:,} tokens of {escape(facts['text'])}; {facts['layers']} layers,",
        f" {facts['heads']} heads of {facts['neurons_per_head']:,} neurons. Shown are the {len(neurons):,} that fire",
        " most strongly for how rarely they do; <code>neurons.json</code> has all that fired.</p>",
        f"<h2>Words</h2>{words}" if words else "",
    ]
    for layer in layers:
        parts.append(f"<h2>Layer {layer}</h2>")
        parts += [_neuron(found) for found in neurons if found.layer == layer]
    return "".join([*parts, "</body></html>\n"])


def _neuron(found: Found) -> str:
    rows = "".join(
        f"<tr><td>{context.value:.3f}</td><td><code>{_text(context.before)}<mark>{_text(context.token)}</mark>"
        f"{_text(context.after)}</code></td></tr>"
        for context in found.contexts
    )
    name = f"head {found.head}, neuron {found.neuron}"
    anchor = f"n{found.layer}-{found.head}-{found.neuron}"
    return (
        f'<h3 id="{anchor}">{name} <small>fires for {found.active:.2%} of the tokens</small></h3><table>{rows}</table>'
    )


def _word(word: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{each['mean']:.3f}</td><td>{each['others']:.3f}</td>"
        f"<td>layer {each['layer']}, head {each['head']}, neuron {each['neuron']}</td></tr>"
        for each in word["neurons"]
    )
    head = "<tr><th>mean here</th><th>elsewhere</th><th>neuron</th></tr>"
    return f"<h3>{escape(word['word'])} <small>{word['occurrences']:,} times</small></h3><table>{head}{rows}</table>"


def _text(text: str) -> str:
    return escape(text.translate(SHOWN))
