"""Sizes in bytes, as people write and read them: '4 GiB'. Knows nothing about what has the size."""

from __future__ import annotations

import math
import re

UNITS = {
    "": 1,
    "b": 1,
    **{f"{u}{i}": s for k, u in enumerate("kmgt", 1) for i, s in (("ib", 2 ** (10 * k)), ("b", 1000**k))},
}


def parse_bytes(value: object) -> object:
    """'4 GiB' to a number of bytes; what is no such text stays as it is."""
    match = re.fullmatch(r"([\d.]+)\s*([a-zA-Z]*)", value.strip()) if isinstance(value, str) else None
    if match and match[2].lower() in UNITS:
        size = float(match[1]) * UNITS[match[2].lower()]
        return int(size) if math.isfinite(size) else value
    return value


def size_text(size: int) -> str:
    """A number of bytes to '4.0 GiB'."""
    value, unit = float(size), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{size} B" if unit == "B" else f"{value:.1f} {unit}"
