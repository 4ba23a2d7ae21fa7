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
        self._weights = (0.0, 0.0, 0.0)
        self._variance = ((UNCERTAIN, 0.0, 0.0), (0.0, UNCERTAIN, 0.0), (0.0, 0.0, UNCERTAIN))
        self._error = 0.0  # the usual one, in seconds
        self._steps = 0

    @property
    def known(self) -> bool:
        return self._steps >= CERTAIN

    def observe(self, decodes: int, prefill_tokens: int, seconds: float) -> None:
        # By hand: as loops, this took as long as all else that is done for a step of one sequence.
        x, y = decodes / SCALE, prefill_tokens / SCALE  # beside the 1 of the base
        (v00, v01, v02), (v10, v11, v12), (v20, v21, v22) = self._variance
        g0, g1, g2 = v00 + v01 * x + v02 * y, v10 + v11 * x + v12 * y, v20 + v21 * x + v22 * y
        news = g0 + x * g1 + y * g2
        w0, w1, w2 = self._weights
        error = seconds - (w0 + w1 * x + w2 * y)
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
        self._weights = (w0 + error * g0 / scale, w1 + error * g1 / scale, w2 + error * g2 / scale)
        # What is never exercised must not be forgotten without bound.
        forget = FORGET if max(v00, v11, v22) < UNCERTAIN else 1.0
        self._variance = (
            ((v00 - g0 * g0 / scale) / forget, (v01 - g0 * g1 / scale) / forget, (v02 - g0 * g2 / scale) / forget),
            ((v10 - g1 * g0 / scale) / forget, (v11 - g1 * g1 / scale) / forget, (v12 - g1 * g2 / scale) / forget),
            ((v20 - g2 * g0 / scale) / forget, (v21 - g2 * g1 / scale) / forget, (v22 - g2 * g2 / scale) / forget),
        )

    def seconds(self, decodes: int, prefill_tokens: int) -> float:
        base, decode, prefill = self._weights
        return max(0.0, base + decode * decodes / SCALE + prefill * prefill_tokens / SCALE)

    @property
    def base(self) -> float:
        """Seconds of a step with nothing in it."""
        return max(0.0, self._weights[0])

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
