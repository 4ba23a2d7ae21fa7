"""What the benchmarks' tests share: results that are made up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HEAD: dict[str, Any] = {
    "command": "python -m benchmarks.made_up",
    "commit": "abc",
    "date": "2026-01-02",
    "machine": {"cpu": "A CPU", "threads": 2, "system": "Linux"},
    "versions": {"x": "1"},
}


def write_json(file: Path, report: Mapping[str, Any]) -> None:
    """Whatever `report` says about itself."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(report))
