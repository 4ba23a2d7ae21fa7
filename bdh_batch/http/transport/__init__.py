"""Connections: listening, limits, HTTP/1.1."""
