"""An OpenAI-compatible HTTP API. Knows backends by their protocol only."""
