"""The pages for people say what is: links lead somewhere, tables are the program's, commands and options exist."""

from __future__ import annotations

import ast
import inspect
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token
from prometheus_client.parser import text_string_to_metric_families

from bdh_batch import cli, client, settings
from bdh_batch.errors import InvalidRequest
from bdh_batch.http.errors import CODES, STATUS
from benchmarks.reports import picture
from docs.tables import rewritten

if TYPE_CHECKING:
    from tests.conftest import Server

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
OTHERS = ("examples/README.md", "models/bdh-shakespeare/README.md", "bdh_batch/kernels/README.md")
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.glob("*.md")), *(ROOT / name for name in OTHERS)]
FEW = 40  # tokens of each completion here, whatever an example asks for
MOST_WORDS, MOST_LINES = 600, 120  # of the README, of the changelog
OPTION = re.compile(rf"(({'|'.join(settings.Settings.model_fields)})\.[a-z_]+)(=.*|: .*)?")
FILES = (".json", ".pt", ".py", ".safetensors")  # names of files look like options
MARKDOWN = MarkdownIt("commonmark").enable("table")


@cache
def tokens(page: Path) -> list[Token]:
    """Of the page, those inside of others too."""
    return list(_flat(MARKDOWN.parse(page.read_text("utf-8"))))


def _flat(nested: list[Token]) -> Iterator[Token]:
    for token in nested:
        yield token
        yield from _flat(token.children or [])


@cache
def anchors(page: Path) -> set[str]:
    """The names of the page's headings, as forges and Sphinx make them."""
    found: Counter[str] = Counter()
    names = set()
    parsed = MARKDOWN.parse(page.read_text("utf-8"))
    for opening, inline in pairwise(parsed):
        if opening.type == "heading_open":
            name = re.sub(r"[^\w\- ]", "", inline.content.lower()).replace(" ", "-")
            names.add(f"{name}-{found[name]}" if found[name] else name)
            found[name] += 1
    return names


def links(page: Path) -> list[str]:
    given = (token.attrGet("href") or token.attrGet("src") for token in tokens(page))
    return [str(target) for target in given if target]


def code(page: Path, *languages: str) -> list[str]:
    return [token.content for token in tokens(page) if token.type == "fence" and token.info in languages]


def by_page(path: Path) -> str:
    return str(path.relative_to(ROOT))


every_page = pytest.mark.parametrize("page", PAGES, ids=by_page)


@every_page
def test_every_link_leads_to_a_file_and_a_heading_that_are_there(page: Path) -> None:
    for link in links(page):
        if re.match(r"[a-z]+:", link):
            assert link.startswith("https://"), link
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in anchors(target), link


def test_every_page_is_linked_from_the_first_one() -> None:
    linked = {(DOCS / link.partition("#")[0]).resolve() for link in links(DOCS / "index.md")}
    missing = sorted(page.name for page in DOCS.glob("*.md") if page not in linked and page.name != "index.md")
    assert not missing, "docs/index.md has a table of the pages"


@every_page
def test_every_table_of_the_program_is_as_it_says(page: Path) -> None:
    text = page.read_text("utf-8")
    assert rewritten(text) == text, "run: python -m docs.tables"


def test_every_option_has_a_table() -> None:
    page = (DOCS / "settings.md").read_text("utf-8")
    of_lists = "".join((DOCS / each).read_text("utf-8") for each in ("processes.md", "gateway.md"))
    assert all(f"| `{option.partition('.')[2]}` |" in page for option in settings.options().keys() - settings.LISTS)
    assert all(f"<!-- table: entry {name} -->" in of_lists for name in settings.LISTS)


@every_page
def test_every_option_that_a_page_speaks_of_exists(page: Path) -> None:
    for token in tokens(page):
        if token.type == "code_inline" and (found := OPTION.fullmatch(token.content)):
            assert found[1] in settings.options() or found[1].endswith(FILES), token.content


@every_page
def test_every_command_exists(page: Path) -> None:
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for block in code(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["bdh-batch"]:
                cli._parser().parse_args(words[1:])
            elif words[:1] == ["make"]:
                assert words[1] in targets, line
    for token in tokens(page):
        if token.type == "code_inline" and (found := re.match(r"python -m ([\w.]+)|make ([a-z-]+)", token.content)):
            assert found[2] in targets if found[2] else find_spec(found[1]), token.content


@every_page
def test_every_example_in_python_is_python(page: Path) -> None:
    for block in code(page, "python"):
        ast.parse(block)


@pytest.mark.parametrize(
    "page", ["README.md", "docs/getting-started.md", "docs/structured-output.md", "docs/states.md"]
)
def test_the_examples_in_python_run(
    page: str,
    server: Server,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    for block in code(ROOT / page, "python"):
        source = re.sub(r"max_tokens=\d+", f"max_tokens={FEW}", block.replace("http://127.0.0.1:8000", server.url))
        exec(compile(source, page, "exec", dont_inherit=True), {"__name__": "example"})
        assert capsys.readouterr().out.strip()


@every_page
def test_every_request_by_curl_is_answered(page: Path, server: Server) -> None:
    for block in code(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["curl"]:
                (url,) = [word for word in words if word.startswith("http://")]
                path, body = url.removeprefix("http://127.0.0.1:8000"), json.loads(words[words.index("-d") + 1])
                response = httpx.post(server.url + path, json=body | {"max_tokens": FEW}, timeout=None)
                assert response.status_code == 200, response.text


def test_every_error_code_is_explained() -> None:
    page = (DOCS / "api.md").read_text("utf-8")
    codes = (
        {code for _, code in STATUS.values()} | {*CODES.values()} | {k.code for k in InvalidRequest.__subclasses__()}
    )
    assert not [code for code in codes if code is not None and f"`{code}`" not in page]


def test_every_metric_is_explained_and_there(server: Server) -> None:
    page = (DOCS / "operations.md").read_text("utf-8")
    explained = set(re.findall(r"^\| `(bdh_\w+)` \|", page, re.MULTILINE))
    scraped = httpx.get(f"{server.url}/metrics", timeout=300).text
    there = {family.name for family in text_string_to_metric_families(scraped) if family.name.startswith("bdh_")}
    assert explained == there


def test_every_name_of_the_client_is_in_the_reference() -> None:
    page = (DOCS / "reference.md").read_text("utf-8")
    assert not [name for name in client.__all__ if f":: bdh_batch.client.{name}\n" not in page]


@pytest.mark.parametrize("method", [client.BDHClient.complete, client.AsyncBDHClient.complete])
def test_the_methods_of_the_client_show_all_their_parameters(method: object) -> None:
    assert callable(method)
    assert [*inspect.signature(method).parameters][:2] == ["self", "prompt"]


def test_the_picture_has_the_figures_of_the_results_that_the_readme_names() -> None:
    (results,) = [ROOT / link for link in links(ROOT / "README.md") if link.endswith(".json")]
    report = json.loads(results.read_text("utf-8"))
    drawn = (DOCS / "throughput.svg").read_text("utf-8")
    for scenario in (report["against"], report["heavy_tailed"]):
        for name, value in picture.bars(scenario).items():
            assert f"<!-- {name} -->" in drawn
            assert f"<!-- {value:,.0f} -->" in drawn, "run: python -m benchmarks.reports.picture --results …"
    assert report["date"] in drawn


def test_the_readme_is_short_and_so_is_the_changelog() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").split()) <= MOST_WORDS
    assert len((ROOT / "CHANGELOG.md").read_text("utf-8").splitlines()) <= MOST_LINES
