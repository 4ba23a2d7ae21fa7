"""/v1/messages as Anthropic's official client sees it."""

from __future__ import annotations
