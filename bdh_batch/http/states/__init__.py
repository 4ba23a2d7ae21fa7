"""Saved states: /v1/states and below, and requests that begin in one."""
