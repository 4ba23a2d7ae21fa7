"""Commands that compute a model in their own process: `run`, to talk to it, and `run-batch`, for files of requests."""
