"""Characters that stand for special tokens in what a chat template renders, so that nothing a client writes is one.

Before a template is compiled, each special token that its own text spells is replaced by a character that no client can
send: a lone surrogate, which JSON has no way to say. What a template does with a client's text (slice, replace, escape,
change its case, print it in a dict) then makes no special token of it: only these characters become one.

Some templates put a special token together from pieces and a message's role, as in `'<|' + message.role + '|>'`. Where
literals and roles are adjacent, they are looked at together; a piece that comes from anywhere else makes text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import product

from jinja2 import nodes
from jinja2.visitor import NodeTransformer

ROLES = ("system", "developer", "user", "assistant", "tool")
CUT = "\udcbf"  # stands for no token: where a prompt ends that goes on with its last message
# Decoded from UTF-8, each is a byte that can follow no other: they come through `surrogateescape` as they are.
ALPHABET = [chr(code) for code in range(0xDC80, ord(CUT))]
SPELL = "_spell"  # the name of the filter
LITERAL, ROLE = "L", "R"
MOST_ROLES = 2  # adjacent, that are tried out in all their combinations

# What looks for a text in another one has to find what a client wrote.
SEARCHING = re.compile(
    "r?split|r?partition|replace|startswith|endswith|r?find|r?index|count|[lr]?strip|remove(pre|suf)fix|get"
)


class TooMany(Exception):
    """A template spells more special tokens than there are characters for."""


class StandIns:
    """Characters that stand for special tokens while a template is rendered.

    Args:
        special: the texts of special tokens, the longest first.
    """

    def __init__(self, special: Sequence[str]) -> None:
        self._special = re.compile("|".join(map(re.escape, special))) if special else None
        self._characters: dict[str, str] = {}
        self._complete = False

    def complete(self) -> None:
        """From now on no other token gets a character: it stays text."""
        self._complete = True

    @property
    def tokens(self) -> dict[str, str]:
        """What each character that is in use stands for."""
        return {character: token for token, character in self._characters.items()}

    def put(self, text: str) -> str:
        """`text` with characters for the special tokens that it spells."""
        return text if self._special is None else self._special.sub(lambda match: self._of(match[0]), text)

    def spelt(self, text: str) -> list[str]:
        """The special tokens that `text` spells."""
        return [] if self._special is None else self._special.findall(text)

    def put_together(self, parts: Sequence[object], kinds: str) -> str:
        """Literals and roles, joined, by the `kinds` of the parts. A role that is none is what a client wrote."""
        texts = list(map(str, parts))
        if all(kind == LITERAL or text in ROLES for kind, text in zip(kinds, texts)):
            return self.put("".join(texts))
        return "".join(self.put(text) if kind == LITERAL else text for kind, text in zip(kinds, texts))

    def _of(self, token: str) -> str:
        if token not in self._characters:
            if self._complete:
                return token
            if len(self._characters) == len(ALPHABET):
                raise TooMany(f"it spells more than {len(ALPHABET)} special tokens")
            self._characters[token] = ALPHABET[len(self._characters)]
        return self._characters[token]


class Literals(NodeTransformer):
    """Replaces the special tokens that a template's own text spells."""

    def __init__(self, stand_ins: StandIns) -> None:
        self._stand_ins = stand_ins

    def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.Node:  # noqa: N802 - as Jinja calls it
        node.data = self._stand_ins.put(node.data)
        return node

    def visit_Const(self, node: nodes.Const) -> nodes.Node:  # noqa: N802
        if isinstance(node.value, str):
            node.value = self._stand_ins.put(node.value)
        return node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:  # noqa: N802
        return node

    def visit_Test(self, node: nodes.Test) -> nodes.Node:  # noqa: N802
        return node

    def visit_Call(self, node: nodes.Call) -> nodes.Node:  # noqa: N802
        if isinstance(node.node, nodes.Getattr) and SEARCHING.fullmatch(node.node.attr):
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)

    def visit_Filter(self, node: nodes.Filter) -> nodes.Node:  # noqa: N802
        if SEARCHING.fullmatch(node.name) and node.node is not None:
            node.node = self.visit(node.node)
            return node
        return self.generic_visit(node)

    def visit_Output(self, node: nodes.Output) -> nodes.Node:  # noqa: N802
        node.nodes = self._together(node.nodes)
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802
        node.nodes = self._together(node.nodes)
        return self.generic_visit(node)

    def visit_Add(self, node: nodes.Add) -> nodes.Node:  # noqa: N802
        first, *others = self._together(_terms(node))
        total: nodes.Expr = self.visit(first)
        for other in others:
            total = nodes.Add(total, self.visit(other), lineno=node.lineno)
        return total

    def _together(self, parts: Sequence[nodes.Expr]) -> list[nodes.Expr]:
        """`parts` of one text; where adjacent literals and roles make a special token, they are one part."""
        found: list[nodes.Expr] = []
        run: list[nodes.Expr] = []
        for part in [*parts, None]:
            if part is not None and (_literal(part) is not None or _is_role(part)):
                run.append(part)
                continue
            found += [self._spelling(run)] if self._makes_one(run) else run
            run = []
            if part is not None:
                found.append(part)
        return found

    def _makes_one(self, run: Sequence[nodes.Expr]) -> bool:
        """Whether, for some roles, a special token reaches over more than one of these."""
        roles = sum(map(_is_role, run))
        if len(run) < 2 or roles > MOST_ROLES:
            return False
        makes_one = False
        for chosen in product(ROLES, repeat=roles):
            names = iter(chosen)
            texts = [next(names) if (text := _literal(part)) is None else text for part in run]
            apart = [token for text in texts for token in self._stand_ins.spelt(text)]
            if self._stand_ins.spelt("".join(texts)) != apart:
                makes_one = True
                self._stand_ins.put("".join(texts))  # from now on there is a character for it
        return makes_one

    @staticmethod
    def _spelling(run: Sequence[nodes.Expr]) -> nodes.Expr:
        line = run[0].lineno
        literals = [_literal(part) for part in run]
        kinds = "".join(ROLE if literal is None else LITERAL for literal in literals)
        parts = [part if literal is None else nodes.Const(literal) for part, literal in zip(run, literals)]
        return nodes.Filter(nodes.List(parts), SPELL, [nodes.Const(kinds)], [], None, None, lineno=line)


def _terms(node: nodes.Expr) -> list[nodes.Expr]:
    """Of a sum, from left to right."""
    terms: list[nodes.Expr] = []
    while isinstance(node, nodes.Add):
        terms.append(node.right)
        node = node.left
    return [node, *reversed(terms)]


def _literal(node: nodes.Expr) -> str | None:
    if isinstance(node, nodes.TemplateData):
        return node.data
    return node.value if isinstance(node, nodes.Const) and isinstance(node.value, str) else None


def _is_role(node: nodes.Expr) -> bool:
    """`message.role`, `message['role']`, or what a template calls so."""
    if isinstance(node, nodes.Getattr):
        return bool(node.attr == "role")
    if isinstance(node, nodes.Getitem):
        return isinstance(node.arg, nodes.Const) and node.arg.value == "role"
    return isinstance(node, nodes.Name) and node.name == "role"
