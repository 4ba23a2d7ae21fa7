"""Makes plain text of the HTML that an app puts around its model's words: sections are taken out, tags too.

Texts come again and again, each time a little longer. So what is made of a text begins with what was made of its
beginning: what may become part of a tag or an entity is left out until it is one, and so is white space at the end.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import NamedTuple

from selectolax.lexbor import LexborHTMLParser, LexborNode, SelectolaxError

from bdh_batch.errors import ConfigError
from bdh_batch.upstreams.config import HtmlSections
from bdh_batch.upstreams.protocol import Fault, FaultKind

# The elements of HTML: whatever else is in angle brackets is text, as in `vector<int>`.
INLINE = """a abbr acronym area audio b base bdi bdo big br button canvas cite code data datalist del dfn em embed font
i iframe img input ins kbd label link map mark meta meter noscript object option output picture progress q rp rt ruby s
samp script select slot small source span strike strong style sub sup svg template textarea time tt u var video wbr"""
BLOCKS = """address article aside blockquote body caption center col colgroup dd details dialog div dl dt fieldset
figcaption figure footer form h1 h2 h3 h4 h5 h6 head header hgroup hr html legend li main menu nav ol optgroup p pre
search section summary table tbody td tfoot th thead title tr ul"""
BLOCK = frozenset(BLOCKS.split())
KNOWN = BLOCK | frozenset(INLINE.split())
NEVER_SHOWN = frozenset(("script", "style", "template", "title", "head"))
TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9-]*)?")
TAG_NAME = re.compile(r"</?[A-Za-z][^\t\n\f\r />]*+")
SPACE = r"[\t\n\f\r ]*+"
VALUE = r"""(?>"[^"]*+"?|'[^']*+'?|[^\t\n\f\r >]*+)"""
ATTRIBUTE = re.compile(rf"[\t\n\f\r /]*+[^\t\n\f\r />][^\t\n\f\r />=]*+(?>{SPACE}={SPACE}{VALUE})?+")
UNFINISHED = re.compile(r"(?:&#?[A-Za-z0-9]*|<(?:/|!-?)?)\Z")  # what may become an entity or a tag
TEXT = "-text"
LONGEST = 2**20  # characters: a parser takes 20 ms for so many


class Sections(NamedTuple):
    """A text without HTML, and the thoughts in it."""

    text: str
    thoughts: str


class Cleaner:
    """Makes plain text of texts with HTML.

    Raises:
        ConfigError: a selector is none.
    """

    def __init__(self, upstream: str, sections: HtmlSections) -> None:
        self._thoughts = ", ".join(sections.thoughts)
        self._removed = ", ".join(sections.remove)
        self._placeholders = frozenset(sections.placeholders)
        self._most = sections.max_tags
        for name, selectors in (("thoughts", self._thoughts), ("remove", self._removed)):
            try:
                _matching(LexborHTMLParser("<p>"), selectors)
            except SelectolaxError as error:
                raise ConfigError(f"upstreams.{upstream}.html.{name}: {selectors!r}: {error}") from error

    def clean(self, html: str, final: bool) -> Sections:
        """Returns what is certain of a text that may go on, or, if it is `final`, all of it.

        Raises:
            Fault: it has too many tags or attributes: what a parser does with them may take the square of their number.
        """
        if html.strip() in self._placeholders:
            return Sections("", "")
        if html.count("<") > self._most or len(html) > LONGEST:
            raise Fault(FaultKind.TOO_LARGE, "too much HTML")
        if not final:
            html = UNFINISHED.sub("", html)
        if "<" not in html and "&" not in html:
            return Sections(html.strip(), "")
        html = _with_known_tags(html, final)
        if _attributes(html, self._most) > self._most:
            raise Fault(FaultKind.TOO_LARGE, "too many attributes")
        tree = LexborHTMLParser(f"<body>{html}")
        thoughts, removed = _matching(tree, self._thoughts), _matching(tree, self._removed)
        text: list[str] = []
        thought: list[str] = []
        for said, is_thought in _texts(tree.body, thoughts, removed):
            (thought if is_thought else text).append(said)
        # White space at the end may be that before a section which is yet to come, and to be taken out.
        return Sections("".join(text).strip(), "".join(thought).strip())


def _with_known_tags(html: str, final: bool) -> str:
    """Returns the same with only HTML's own tags as such."""

    last = html.rfind(">")

    def shown(found: re.Match[str]) -> str:
        name = (found[2] or "").lower()
        at_end = found.end() == len(html)
        if name in KNOWN and not (final and found.end() > last):
            return found[0]
        if not name and html.startswith("<!--", found.start()):
            return found[0]
        if at_end and not final and any(known.startswith(name) for known in KNOWN):
            return found[0]  # the parser leaves out what is no whole tag
        return f"&lt;{found[0][1:]}"

    return TAG.sub(shown, html)


def _attributes(html: str, most: int) -> int:
    """Returns how many attributes all tags have, or a number above `most`. What only looks like a tag counts, too."""
    number = 0
    for tag in TAG_NAME.finditer(html):
        at = tag.end()
        while number <= most and (found := ATTRIBUTE.match(html, at)) is not None:
            number += 1
            at = found.end()
    return number


def _matching(tree: LexborHTMLParser, selectors: str) -> Collection[int]:
    return {node.mem_id for node in tree.css(selectors)} if selectors else ()


def _texts(root: LexborNode | None, thoughts: Collection[int], removed: Collection[int]) -> Iterator[tuple[str, bool]]:
    """Yields the texts below `root` in their order, each with whether it is part of a thought. Without recursion, as
    elements may be nested deep."""
    node, thinking = root, 0  # the depth of thoughts within thoughts
    ended = {True: True, False: True}  # whether the text so far ends a line
    while node is not None and root is not None:
        tag, kind = node.tag, thinking > 0
        if tag == TEXT:
            if said := node.text_content or "":
                ended[kind] = said.endswith("\n")
                yield said, kind
        elif tag == "br":
            ended[kind] = True
            yield "\n", kind
        inside = None
        if not (tag in NEVER_SHOWN or node.mem_id in removed or (kind and tag == "summary")):
            if tag in BLOCK and not ended[kind]:
                ended[kind] = True
                yield "\n", kind
            inside = node.child if tag != TEXT else None
        if inside is not None:
            thinking += node.mem_id in thoughts
            node = inside
            continue
        while node is not None and node.mem_id != root.mem_id:
            if tag in BLOCK and not ended[thinking > 0]:
                ended[thinking > 0] = True
                yield "\n", thinking > 0
            if node.next is not None:
                node = node.next
                break
            node = node.parent
            tag = "" if node is None else node.tag
            thinking -= node is not None and node.mem_id in thoughts
        else:
            return
