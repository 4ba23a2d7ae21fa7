"""What a supervisor sees of an engine process, without a model: `python -m tests.processes.idle_engine MODE ...`.

It reports that it is ready and has a heartbeat; where MODE is "mute", it does neither.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from bdh_batch.processes.children import Report
from bdh_batch.processes.folder import RuntimeFolder

BEAT_SECONDS = 0.02


def main() -> None:
    mode, spec = sys.argv[1], sys.argv[sys.argv.index("--process") + 1]
    name, _, folder, _, _, _, report, *_ = spec.split(":")
    runtime = RuntimeFolder(Path(folder))
    if mode != "mute":
        runtime.beat(name)
        os.write(int(report), Report(None).dump())
        os.close(int(report))
    supervisor = os.getppid()
    while os.getppid() == supervisor:
        time.sleep(BEAT_SECONDS)
        if mode != "mute":
            runtime.beat(name)


if __name__ == "__main__":
    main()
