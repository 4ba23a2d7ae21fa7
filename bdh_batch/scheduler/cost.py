"""Estimates how long a step will take: seconds = base + decode · (sequences that decode) + prefill · (prompt tokens).

Fitted while running, by recursive least squares that forgets, so that it follows the machine; a step that took far
longer than the model says (another program, a page fault) moves it no more than a usual error would.
"""

from __future__ import annotations

FORGET = 0.99  # per step
CERTAIN = 12  # steps before the model is believed
OUTLIER = 4.0  # times the usual error
UNCERTAIN = 1e4  # the variance of a coefficient that nothing is known of
SCALE = 64.0  # sequences or tokens that count as one, so that all three coefficients are of one size


class StepCost:
    """Estimates the seconds of a step, from the steps so far."""

    def __init__(self) -> None:
        self._weights = [0.0, 0.0, 0.0]
        self._variance = [[UNCERTAIN if row == column else 0.0 for column in range(3)] for row in range(3)]
        self._error = 0.0  # the usual one, in seconds
        self._steps = 0

    @property
    def known(self) -> bool:
        return self._steps >= CERTAIN

    def observe(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        features = (1.0, decodes / SCALE, prefill_tokens / SCALE)
        gain = [sum(row[at] * features[at] for at in range(3)) for row in self._variance]
        news = sum(feature * part for feature, part in zip(features, gain, strict=True))
        error = seconds - self._dot(features)
        size = abs(error)
        # A step unlike any before shows something new, however far off the model is.
        if self.known and size > (most := OUTLIER * self._error * (1.0 + news)):
            error *= most / size
        if news < 1.0:
            usual = min(size, OUTLIER * self._error) if self.known else size
            # It may grow again, however small it became: the machine may have changed for good.
            self._error = max(self._error + 0.05 * (usual - self._error), 0.01 * size)
        self._steps += 1
        scale = FORGET + news
        self._weights = [weight + error * part / scale for weight, part in zip(self._weights, gain, strict=True)]
        # What is never exercised must not be forgotten without bound.
        forget = FORGET if max(self._variance[at][at] for at in range(3)) < UNCERTAIN else 1.0
        self._variance = [
            [(self._variance[row][column] - gain[row] * gain[column] / scale) / forget for column in range(3)]
            for row in range(3)
        ]

    def seconds(self, decodes: int, prefill_tokens: int) -> float:
        return max(0.0, self._dot((1.0, decodes / SCALE, prefill_tokens / SCALE)))

    @property
    def prompt_token(self) -> float | None:
        """Seconds that one more of them takes; None while that is not known."""
        return self._each(self._weights[2])

    @property
    def stream(self) -> float | None:
        """Seconds that one more sequence takes that decodes; None while that is not known."""
        return self._each(self._weights[1])

    def _each(self, weight: float) -> float | None:
        """Seconds for one of what costs `weight`; None while that is not known."""
        return weight / SCALE if self.known and weight > 0 else None

    def _dot(self, features: tuple[float, float, float]) -> float:
        return sum(weight * feature for weight, feature in zip(self._weights, features, strict=True))
