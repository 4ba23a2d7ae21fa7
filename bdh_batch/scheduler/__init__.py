"""Decides which sequences run next, and in which slots. Pure: imports neither torch, asyncio nor the model."""
