"""Kernels, the engine in process, planning and simulated loads: nothing here speaks HTTP."""
