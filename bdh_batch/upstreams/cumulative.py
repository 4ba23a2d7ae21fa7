"""Deltas of a text that an upstream sends as a whole again and again, each time longer."""

from __future__ import annotations

from bdh_batch.upstreams.protocol import Fault, FaultKind


class Cumulative:
    """Remembers what has been sent of a text."""

    def __init__(self) -> None:
        self._sent = ""

    def advance(self, text: str) -> str:
        """Returns what is new in `text`.

        Raises:
            Fault: it does not begin with what has been sent: the client has wrong text, and nothing can take it back.
        """
        if not text.startswith(self._sent):
            raise Fault(FaultKind.REWRITTEN)
        new = text[len(self._sent) :]
        self._sent = text
        return new
