"""Responses: frames, streams, whole bodies."""
