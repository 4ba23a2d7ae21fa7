"""HTML to plain text: what is said of a beginning is the beginning of what is said of the whole, at bounded cost."""

from __future__ import annotations

import html
import time

import pytest
from hypothesis import given, settings, strategies as st
from selectolax.lexbor import LexborHTMLParser

from bdh_batch.errors import ConfigError
from bdh_batch.upstreams.config import HtmlSections
from bdh_batch.upstreams.html import Cleaner, _attributes
from bdh_batch.upstreams.protocol import Fault, FaultKind

CLEANER = Cleaner("up", HtmlSections())
PIECES = [
    *(
        "Hello",
        " ",
        "\n\n",
        "a < b",
        "AT&T",
        "&amp;",
        "&lt;b&gt;",
        "&#65;",
        "vector<int>",
        "#include <stdio.h>",
        "<b>",
        "</b>",
    ),
    *(
        "<br>",
        "<p>",
        "</p>",
        "<li>one",
        "<details class='thought'><summary>s</summary>",
        "deep",
        "</details>",
        "<!-- c -->",
    ),
    *(
        "<div style='color:#666'>",
        "</div>",
        "<script>x()</script>",
        "<x",
        "<",
        "&",
        ">",
        "é",
        "<img src='a>b'>",
        "&nbsp;x",
    ),
]


def clean(text: str) -> str:
    return CLEANER.clean(text, final=True).text


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("plain  text\n", "plain  text"),
        ("a < b and c > d", "a < b and c > d"),
        ("if (a<b", "if (a<b"),
        ("vector<int> v; List<String>", "vector<int> v; List<String>"),
        ("<b>bold</b> &amp; <i>more</i>", "bold & more"),
        ("one<br>two<p>three</p><p>four</p>", "one\ntwo\nthree\nfour"),
        ("<ul><li>a</li><li>b</li></ul>", "a\nb"),
        ("<script>bad()</script>good<style>x</style>", "good"),
        ("<details class='thought'>a<details>b</details>c</details>said", "said"),
        ("<details class='thought'>cut off", ""),
        ("x<!-- gone -->y", "xy"),
        ("&lt;details class='thought'&gt;", "<details class='thought'>"),
    ],
)
def test_what_is_left_of_html(given: str, text: str) -> None:
    assert clean(given) == text


def test_thoughts_are_kept_apart_without_their_heading() -> None:
    found = CLEANER.clean("<details class='thought'><summary>Thinking</summary>a<br>b</details>said", final=True)
    assert found == ("said", "a\nb")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
def test_what_was_said_of_a_beginning_stays(text: str) -> None:
    """But for entities without a semicolon and tables, which move text, it is never taken back."""
    said, thought = "", ""
    for end in range(len(text) + 1):
        found = CLEANER.clean(text[:end], final=False)
        assert found.text.startswith(said)
        assert found.thoughts.startswith(thought)
        said, thought = found
    found = CLEANER.clean(text, final=True)
    assert found.text.startswith(said)
    assert found.thoughts.startswith(thought)


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters(codec="utf-8", exclude_characters="\0\r"), max_size=40))
def test_escaped_text_comes_back_as_it_was(text: str) -> None:
    assert clean(f"<b>{html.escape(text)}</b>") == text.strip()


@pytest.mark.parametrize(
    "tag", ["<div>", "<b>", "<p><b>", "<table>", "<a>x", "<details class=thought>", "<li>", "<template>"]
)
def test_bombs_are_refused_or_cheap(tag: str) -> None:
    most = HtmlSections().max_tags // tag.count("<")
    began = time.process_time()
    CLEANER.clean(tag * most, final=False)
    assert time.process_time() - began < 2  # generously: the square of the tags there may be at most
    with pytest.raises(Fault) as refused:
        CLEANER.clean(tag * (most + 1), final=False)
    assert refused.value.kind is FaultKind.TOO_LARGE


ATTRIBUTES = ["a{}", "a{}=1", 'a{}="1 2"', "a{}='1 2'", "a{} = 1", "a{}/", '"a{}']


@pytest.mark.parametrize("attribute", ATTRIBUTES)
def test_bombs_of_attributes_are_refused(attribute: str) -> None:
    """A parser compares each one with all before it: 90,000 took it 87 s."""
    most = HtmlSections().max_tags
    for number in (most, most + 1, 40 * most):
        html = f"<b {' '.join(attribute.format(each) for each in range(number))}>x</b>"
        if number == most:
            assert clean(html) == "x"
        else:
            with pytest.raises(Fault) as refused:
                CLEANER.clean(html, final=True)
            assert refused.value.kind is FaultKind.TOO_LARGE


ANY_ATTRIBUTES = st.text(alphabet=[*"ab=/ \"'\n", "="], max_size=40)


@given(st.lists(ANY_ATTRIBUTES, max_size=5))
def test_no_attribute_goes_uncounted(attributes: list[str]) -> None:
    html = "".join(f"<b {each}>x" for each in attributes)
    found = LexborHTMLParser(f"<body>{html}").css("b")
    assert _attributes(html, 2**20) >= sum(len(node.attributes) for node in found)


def test_a_selector_that_is_none_is_a_matter_of_the_settings() -> None:
    with pytest.raises(ConfigError, match=r"upstreams\.up\.html\.remove"):
        Cleaner("up", HtmlSections(remove=["div[[["]))
