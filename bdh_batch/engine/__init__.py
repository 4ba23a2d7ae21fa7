"""The engine owns a thread and tensors: the worker, the runner, the pool of states."""
