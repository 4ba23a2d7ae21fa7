"""What is measured of this project. Each package holds programs, run as `python -m benchmarks.PACKAGE.NAME`:

engine    kernels, the engine in process, planning, simulated loads
server    the whole server over HTTP, and its baselines
stress    load past saturation, clients that misbehave, hostile and random inputs
reports   all of it in one run, its tables and pictures, comparisons

Results lie in `results/MACHINE/` (`report.py`).
"""

from pathlib import Path

ROOT = Path(__file__).parents[1]
