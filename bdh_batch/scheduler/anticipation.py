"""Says whether the next plan waits a moment for a tenant that is about to ask again. Decides nothing of who runs.

Who asks for one thing after another has read the end of a response when the next step has just begun, and would wait
for all of it, however little virtual time it has. So the plan waits for a tenant that would go first, for a part of
what a step takes, if that tenant came back at once when it last had nothing left. This is the anticipatory scheduling
of Iyer & Druschel (SOSP 2001). The time that it takes has a bound, which is lower where nobody came.
"""

from __future__ import annotations

from dataclasses import dataclass

KNOWN = 1024  # tenants, those that last had nothing left
MOST = 1 / 32  # of the time, at most, is waited
MOST_IN_VAIN = 1 / 128  # where the tenant does not come


@dataclass(slots=True)
class Absence:
    """When a tenant that has nothing left should be back, and whether it was in time before."""

    until: float | None = None  # None while it has something
    returned: bool = False


class Anticipation:
    """Waits between two steps for tenants, for one at a time.

    Args:
        part: of what a step took, for which the next one waits; 0 is never.
    """

    def __init__(self, part: float) -> None:
        self._part = part
        self._absences: dict[str, Absence] = {}
        self._awaited: str | None = None
        self._began = self._until = self._not_before = 0.0

    def until(self, now: float) -> float:
        """Until when the next plan waits for a request; `now` where it does not."""
        if self._awaited is not None and now >= self._until:
            self._stop(now, MOST_IN_VAIN)
        return now if self._awaited is None else self._until

    def left(self, tenant: str, goes_first: bool, seconds: float, now: float) -> None:
        """The last sequence of `tenant` has ended, at `now`, with a step that took so many `seconds`. `goes_first` is
        whether one more would be the first in rank."""
        absence = self._absences.pop(tenant, None) or Absence()
        self._absences[tenant] = absence
        if len(self._absences) > KNOWN:
            del self._absences[next(iter(self._absences))]
        absence.until = now + seconds
        if absence.returned and goes_first and self._part and self._awaited is None and now >= self._not_before:
            self._awaited, self._began = tenant, now
            self._until = absence.until = now + self._part * seconds

    def arrived(self, tenant: str, now: float) -> None:
        """A sequence of `tenant` has come."""
        absence = self._absences.get(tenant)
        if absence is not None and absence.until is not None:
            absence.returned, absence.until = now <= absence.until, None
        if tenant == self._awaited:
            self._stop(now, MOST)

    def _stop(self, now: float, most: float) -> None:
        self._awaited = None
        waited = max(0.0, min(now, self._until) - self._began)  # the engine may have been idle since
        self._not_before = now + waited / most
