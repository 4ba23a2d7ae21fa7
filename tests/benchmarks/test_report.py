"""Every result says what made it and lies where results lie; there is one way to write them and one client."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ROOT
from benchmarks.report import HEAD, RESULTS, UNKNOWN, commit, missing_in, report_head, write_report
from tests.benchmarks import support

PACKAGE = ROOT / "benchmarks"
MOST_LINES = 400
KEPT = sorted(RESULTS.rglob("*.json"))
SUITES = ("suite", "suite-second-run")
HASH = re.compile(r"[0-9a-f]{40}(-dirty)?")

# What writes files, and which. All else of these is a result.
WRITERS = {
    "report": "results",
    "plots": "pictures",
    "engine/peer": "a model's folder, which it loads",
    "engine/simulate": "a picture, and figures on its standard output",
    "fleet/page": "tables in docs/fleets.md",
    "reports/document": "docs/performance.md",
    "reports/widths": "a table in docs/models.md",
    "server/loads": "prompts for `bench serve`",
    "stress/faulty": "a census",
    "stress/fuzz": "a chat template",
    "stress/hostile": "a chat template",
    "stress/store_kills": "states for a store",
    "stress/locustfile": "what its users saw, for stress/load",
}
READERS = {"report", "fleet/page"}  # of the folder of results, which write none there
WRITING = {"write_text", "write_bytes", "dump", "savefig", "save", "savetxt"}
# What may be imported where; the top is for all.
PACKAGES = {
    "engine": set(),
    "fleet": {"engine"},
    "server": {"engine"},
    "stress": set(),
    "reports": {"engine", "server"},
}
# What speaks to servers, beside the client: a port that is free, bytes, locust's own.
SPEAKING = {"client", "served", "raw", "stress/locustfile"}
CLIENTS = {"aiohttp", "geventhttpclient", "h11", "http", "httptools", "httpx", "requests", "socket", "urllib"}


def name_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").as_posix()


MODULES = {name_of(file): ast.parse(file.read_text()) for file in sorted(PACKAGE.rglob("*.py"))}


def heads(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Of a result, or of each of its sections."""
    if all(name in report for name in HEAD):
        return [report]
    return [part for part in report.values() if isinstance(part, dict)]


def imported(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(tree: ast.Module) -> set[str]:
    functions = (node.func for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {each.attr if isinstance(each, ast.Attribute) else ast.unparse(each) for each in functions}


def strings(tree: ast.Module) -> set[str]:
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}


@pytest.mark.parametrize("file", KEPT, ids=lambda file: str(file.relative_to(RESULTS)))
def test_every_kept_result_says_what_made_it(file: Path) -> None:
    report = json.loads(file.read_text())
    assert missing_in(report) == []
    for head in heads(report):
        assert HASH.fullmatch(head.get("commit") or head["committed_in"])


def test_every_kept_result_lies_where_results_lie_and_nothing_twice() -> None:
    assert len(KEPT) > 10
    for file in KEPT:
        _, *between, _ = file.relative_to(RESULTS).parts
        assert between in ([], *([name] for name in SUITES)), file
    contents = Counter(file.read_bytes() for file in RESULTS.rglob("*") if file.is_file())
    assert set(contents.values()) == {1}


def test_all_benchmarks_write_their_results_in_one_way() -> None:
    """A module that writes anything else is in the table."""
    assert {name for name, tree in MODULES.items() if called(tree) & WRITING} == set(WRITERS)
    for name, tree in MODULES.items():
        if "results_folder()" in {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Call)}:
            assert name in READERS or {"report_head", "write_report"} <= called(tree), name
        if "--out" in strings(tree) and name not in WRITERS:
            assert called(tree) & {"write_report", "suite_folder"}, name


def test_all_benchmarks_have_one_client() -> None:
    for name, tree in MODULES.items():
        if name not in SPEAKING:
            assert not {each.split(".")[0] for each in imported(tree)} & CLIENTS, name
            assert not called(tree) & {"open_connection", "create_connection"}, name


def test_packages_depend_on_each_other_in_one_direction() -> None:
    assert {name.split("/")[0] for name in MODULES if "/" in name} == set(PACKAGES)
    for name, tree in MODULES.items():
        own = name.split("/")[0] if "/" in name else None
        allowed = (PACKAGES[own] | {own}) if own else set()
        used = {each.split(".")[1] for each in imported(tree) if each.startswith("benchmarks.")}
        assert not used & (set(PACKAGES) - allowed), name


def test_modules_are_short() -> None:
    assert not [name for name in MODULES if len((PACKAGE / f"{name}.py").read_text().splitlines()) > MOST_LINES]


def test_a_report_is_written_where_there_was_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3.11", "-m", "benchmarks.made_up", "--quick"])
    report = {**report_head(["torch"], gpu="none"), "a": [1]}
    write_report(tmp_path / "new" / "report.json", report)
    assert json.loads((tmp_path / "new" / "report.json").read_text()) == report
    assert report["machine"]["gpu"] == "none"
    assert report["versions"].keys() == {"python", "torch"}
    assert report["command"] == "python -m benchmarks.made_up --quick"
    assert HASH.fullmatch(report["commit"]) or report["commit"] == UNKNOWN


@pytest.mark.parametrize("name", support.HEAD)
def test_a_report_that_does_not_say_what_made_it_is_not_written(name: str, tmp_path: Path) -> None:
    lacking = {key: value for key, value in support.HEAD.items() if key != name}
    for report in (lacking, {"one": {**support.HEAD, "a": 1}, "two": {**lacking, "a": 1}}):
        with pytest.raises(ValueError, match=r"r\.json: a result should begin with its report_head"):
            write_report(tmp_path / "r.json", report)
    assert not list(tmp_path.iterdir())
    write_report(tmp_path / "r.json", {"one": {**support.HEAD, "a": 1}, "two": support.HEAD, "repetitions": 2})


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    return subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def test_a_commit_says_whether_there_was_more(tmp_path: Path) -> None:
    assert commit(tmp_path) == UNKNOWN
    git(tmp_path, "init", "--quiet")
    assert commit(tmp_path) == UNKNOWN
    (tmp_path / "code.py").write_text("a")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "a")
    head = git(tmp_path, "rev-parse", "HEAD").strip()
    assert commit(tmp_path) == head
    support.write_json(tmp_path / "benchmarks" / "results" / "new.json", {})  # of the benchmark before
    assert commit(tmp_path) == head
    (tmp_path / "code.py").write_text("b")
    assert commit(tmp_path) == f"{head}-dirty"
    (tmp_path / "copy").mkdir()
    assert commit(tmp_path / "copy") == UNKNOWN


def test_a_commit_is_unknown_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit() == UNKNOWN
