"""The examples of docs/python.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

PAGE = Path(__file__).parent.parent.parent / "docs" / "python.md"
FEW = 8  # tokens of each completion here, whatever an example asks for


def test_the_examples_run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = MarkdownIt("commonmark").parse(PAGE.read_text("utf-8"))
    blocks = [token.content for token in parsed if token.type == "fence" and token.info == "python"]
    known: dict[str, Any] = {"__name__": "example"}
    for block in blocks:
        source = re.sub(r"max_tokens=\d+", f"max_tokens={FEW}", block)
        exec(compile(source, str(PAGE), "exec", dont_inherit=True), known)
        assert capsys.readouterr().out.strip() or "import_state" in block
    assert len(blocks) > 4
