"""A continuous-batching server for BDH models with an OpenAI-compatible API."""

__version__ = "0.1.0"
