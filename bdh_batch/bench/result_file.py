"""The JSON file of a run. Whether it can be written is known before the run."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import Any

from bdh_batch.bench.options import Options
from bdh_batch.errors import ConfigError


def result_path(options: Options, model: str, date: datetime) -> Path | None:
    """Where the result goes, in a folder that is made if need be; None where none is asked for.

    Raises ConfigError where nothing can be written there.
    """
    if not (options.save_result or options.append_result):
        return None
    path = Path(options.result_dir) / (options.result_filename or _name(options, model, date))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--result-dir {path.parent}: {error.strerror}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"--result-filename {path}: cannot be written")
    return path


def _name(options: Options, model: str, date: datetime) -> str:
    rate = f"{options.request_rate}qps"
    if options.ramp_up_strategy is not None:
        rate = f"ramp-up-{options.ramp_up_strategy}-{options.ramp_up_start_rps:g}qps-{options.ramp_up_end_rps:g}qps"
    concurrency = "" if options.max_concurrency is None else f"-concurrency{options.max_concurrency}"
    name = model.rpartition("/")[2]
    return f"{options.label or options.backend}-{rate}{concurrency}-{name}-{date:%Y%m%d-%H%M%S}.json"


def write(path: Path, result: dict[str, Any], append: bool) -> None:
    """One object in one line. Raises ConfigError where the disk does not take it."""
    line = json.dumps(result, allow_nan=False)
    try:
        with path.open("a" if append else "w", encoding="utf-8") as file:
            file.write(("\n" if append and file.tell() else "") + line)
    except OSError as error:
        raise ConfigError(f"--result-filename {path}: {error.strerror}") from None
