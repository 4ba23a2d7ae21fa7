"""Sources and pages use the field's words; those of an older vocabulary that have no other sense here are gone."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
OLD = re.compile(
    r"\b(jail\w*|desks?|furnish\w*|tickets?|dealers?|dealt|displac(e|es|ed|ing)|owe[ds]?|wish(es|ed|ing)?|bears?"
    r"|kept states?|front doors?|gives up its state"
    r"|TokenScore|score_prompt|prompt_scores|target_scores|Adjustments?)\b"
)
NOT_OURS = re.compile(r"/(\.|node_modules|_build)")


@pytest.mark.parametrize("folder", ["bdh_batch", "benchmarks", "docs", "examples", "tests"])
def test_no_word_of_the_older_vocabulary_is_left(folder: str) -> None:
    files = [file for kind in ("py", "md") for file in sorted((ROOT / folder).rglob(f"*.{kind}"))]
    ours = [file for file in files if not NOT_OURS.search(f"/{file.relative_to(ROOT)}") and file != Path(__file__)]
    assert ours
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match[0]}"
        for file in ours
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1)
        if (match := OLD.search(line))
    ]
    assert found == []
