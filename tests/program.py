"""A short program as a module: `python -m tests.program TEXT`, which the launcher can fork."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    exec(compile(sys.argv[1], "program", "exec", dont_inherit=True), {"__name__": "__main__"})
