"""Backends generate completions for the HTTP layer: in this process, or with engines in others."""
