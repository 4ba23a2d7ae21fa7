"""The tests. Their process, and all programs that it starts, have an environment that libraries read when they load."""

import os

# Threads of OpenMP that have nothing to do sleep at once: otherwise they would spin for a while after each operation,
# and take the cores from those that work. Read when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
