"""What the scheduler was asked and what it decided, as JSON lines, so that a run can be looked at and played again.

A prompt is written as hashes of its blocks, each chained to those before and salted anew for every trace: which prompts
begin alike can be seen, what they say cannot.
"""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bdh_batch.scheduler.batch import Step
from bdh_batch.scheduler.prefixes import TOKEN_BYTES, pack
from bdh_batch.scheduler.scheduler import Update
from bdh_batch.scheduler.sequence import Sequence

BLOCK = 16  # tokens

log = logging.getLogger(__name__)


class Trace:
    """Writes the scheduler's decisions to a file as JSON lines."""

    def __init__(self, file: Path) -> None:
        self._file = file.open("w", encoding="utf-8", buffering=1 << 16)
        self._salt = secrets.token_bytes(16)
        self._broken = False

    def submitted(self, sequences: Iterable[Sequence], now: float) -> None:
        for s in sequences:
            self._write(
                "submit",
                now,
                place=s.standing.arrival,
                arrived=s.times.arrived,
                request=s.id,
                key=s.prefix.cache_namespace,
                tenant=s.tenant,
                priority=s.priority,
                prompt_tokens=len(s.prompt),
                prompt=self._blocks(s),
                max_tokens=s.completion.max_tokens,
                queue_deadline=s.queue_deadline,
                deadline=s.deadline,
            )

    def stepped(self, step: Step, now: float, error: str | None = None) -> None:
        segments = zip(step.sequences, step.plan.segments, strict=True)
        self._write(
            "step",
            step.planned,
            seconds=now - step.planned,
            decodes=step.decodes,
            prefill={
                s.standing.arrival: len(segment.tokens) for s, segment in segments if segment.start < len(s.prompt)
            },
            copies=[list(copy) for copy in step.plan.copies],
            places=[s.standing.arrival for s in step.sequences],
            error=error,
        )

    def updated(self, updates: Iterable[Update], now: float) -> None:
        for s, delta in updates:
            if delta.finish_reason is not None:
                reason, tokens = delta.finish_reason.value, len(s.generated)
                arrival, cached = s.standing.arrival, s.prefix.cached
                self._write("end", now, place=arrival, reason=reason, generated=tokens, cached=cached)

    def close(self) -> None:
        try:
            self._file.close()
        except OSError as error:
            log.error("the end of the trace could not be written: %s", error)

    def _blocks(self, sequence: Sequence) -> list[str]:
        running, prompt, size = blake2b(self._salt, digest_size=4), pack(sequence.prompt), BLOCK * TOKEN_BYTES
        blocks = []
        for start in range(0, len(prompt), size):
            running.update(prompt[start : start + size])
            blocks.append(running.copy().hexdigest())
        return blocks

    def _write(self, event: str, now: float, **values: Any) -> None:
        if self._broken:
            return
        try:
            self._file.write(json.dumps({"event": event, "now": now, **values}, separators=(",", ":")) + "\n")
        except OSError as error:  # a full disk, say: no reason to stop serving
            self._broken = True
            log.error("the trace ends here, as it cannot be written: %s", error)
