"""Numbers of a JSON schema, written so that the grammar library keeps to them exactly.

The library reads bounds as doubles (by a reader that may be off by one unit in the last place), cuts those of integers
down to 64 bits, and writes them as decimals. So a bound that it would round is moved inwards to the next one that it
does not: every value that is generated satisfies the bound as it was sent. A constant cannot be moved, and is refused.
Numbers are compared as fractions, never as doubles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from typing import Any, TypeGuard

from bdh_batch.system.documents import values_in

EXACT = 2**53  # from there on, not every integer is a double
LARGEST_INTEGER = 2**63 - 1024  # the largest double that 64 bits hold
LARGEST_BOUND = 10**18  # the library cannot write more digits where the other bound is open
MOST_DECIMALS = 60  # of a bound: the library's expression nests once for each
LARGEST_STEP = 2**32 - 1  # digits of multipleOf
LARGEST_COUNT = 2**31  # of characters, items or properties; no completion is so long
RELATIVE_GAP = 6  # digits by which an open end is closed, relative to the interval's width
POWERS = 308  # the largest power of ten that the library multiplies by at once
GAP = Fraction(1, 10**9)  # and where the width is not known


class BadNumber(Exception):
    """A number that is invalid in a schema, or that cannot be kept exactly: a 400 that names its keyword."""

    def __init__(self, keyword: str, text: str) -> None:
        super().__init__(text)
        self.keyword = keyword


class EmptyInterval(Exception):
    """No number lies within the bounds of a schema: it is satisfied by none."""


@dataclass(frozen=True, slots=True)
class _Bound:
    """A lower bound. An upper one is the lower bound of the negated numbers."""

    value: Fraction
    exclusive: bool = False


def numeric_keywords(schema: Mapping[str, Any], only_integers: bool, alone: bool) -> dict[str, Any]:
    """The bounds and the step of `schema` as the library reads them exactly.

    Args:
        only_integers: whether its numbers are integers.
        alone: whether no other schema is intersected with this one.

    Raises:
        BadNumber, EmptyInterval
    """
    lower = _bound(schema, "minimum", "exclusiveMinimum", 1)
    upper = _bound(schema, "maximum", "exclusiveMaximum", -1)
    if lower is not None and upper is not None and _is_empty(lower, upper):
        raise EmptyInterval
    found = _integers(lower, upper) if only_integers else _numbers(lower, upper, alone)
    step = _step(schema, only_integers)
    if step is None:
        return found
    if not _has_multiple(found, _exact(step), only_integers):
        raise EmptyInterval
    return {**found, "multipleOf": step}


def digits_of(step: int | float) -> int:
    """What the library computes with where steps are intersected: the digits of `step`, times its power of ten."""
    exact, decimals = _exact(step), 0
    while exact.denominator != 1:
        exact, decimals = exact * 10, decimals + 1
    return exact.numerator * int(10**decimals)


def check_constant(keyword: str, value: object) -> None:
    """Raises BadNumber where a number in `value`, at whatever depth, would be generated as another one."""
    for each in values_in(value):
        if _is_number(each) and not _is_exact_constant(each):
            raise BadNumber(keyword, f"the number {each} cannot be kept exactly; a string can")


def count(schema: Mapping[str, Any], keyword: str) -> int | None:
    """A count such as `maxItems`, None where it is absent or so high that it asks for nothing.

    Raises:
        BadNumber: it is no count, or asks for more than there can be.
    """
    value = schema.get(keyword)
    if value is None:
        return None
    if not _is_number(value) or value < 0 or value != int(value):
        raise BadNumber(keyword, "should be a whole number, 0 or more")
    if value < LARGEST_COUNT:
        return int(value)
    if keyword.startswith("min"):
        raise BadNumber(keyword, f"should be less than {LARGEST_COUNT}")
    return None


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_exact_constant(value: int | float) -> bool:
    if isinstance(value, float):  # a large one may have been an integer of more than 64 bits
        return abs(value) < EXACT and _is_read_exactly(value)
    return abs(value) <= LARGEST_INTEGER and int(float(value)) == value


def _exact(value: int | float) -> Fraction:
    """Of a double, the shortest decimal that is read as it: what a client wrote, and the library writes."""
    return Fraction(Decimal(repr(value))) if isinstance(value, float) else Fraction(value)


def _is_read_exactly(value: float) -> bool:
    """Whether the library reads `value` as it is written in JSON: it multiplies digits by a power of ten, and rounds
    twice."""
    _, digits, exponent = Decimal(repr(value)).as_tuple()
    read = float(int("".join(map(str, digits))))
    while exponent:
        power = max(-POWERS, min(POWERS, int(exponent)))
        read = read * float(f"1e{power}") if power > 0 else read / float(f"1e{-power}")
        exponent = int(exponent) - power
    return read == abs(value)


def _bound(schema: Mapping[str, Any], inclusive: str, exclusive: str, sign: int) -> _Bound | None:
    """The tighter of the two, of the numbers times `sign`. Draft 4 has a boolean for `exclusive`."""
    found = []
    value, other = _number(schema, inclusive, sign), schema.get(exclusive)
    if value is not None:
        found.append(_Bound(value, other is True))
    if not isinstance(other, bool) and (value := _number(schema, exclusive, sign)) is not None:
        found.append(_Bound(value, True))
    return max(found, key=lambda bound: (bound.value, bound.exclusive), default=None)


def _number(schema: Mapping[str, Any], keyword: str, sign: int) -> Fraction | None:
    value = schema.get(keyword)
    if value is None:
        return None
    if not _is_number(value):
        raise BadNumber(keyword, "should be a number")
    if isinstance(value, float) and EXACT <= abs(value) < LARGEST_BOUND**2:  # it may have been rounded as it was read
        value = math.nextafter(value, sign * math.inf)
    return sign * _exact(value)


def _is_empty(lower: _Bound, upper: _Bound) -> bool:
    closed = not (lower.exclusive or upper.exclusive)
    return lower.value > -upper.value or (lower.value == -upper.value and not closed)


def _integers(lower: _Bound | None, upper: _Bound | None) -> dict[str, Any]:
    least, most = _least_integer(lower), _least_integer(upper)
    if least is not None and most is not None and least > -most:
        raise EmptyInterval
    least, most = _as_double(least, "minimum"), _as_double(most, "maximum")
    # Both ends, as the library writes no more than 18 digits where one is open.
    if least is not None and most is None and least >= LARGEST_BOUND:
        most = -LARGEST_INTEGER
    if most is not None and least is None and most >= LARGEST_BOUND:
        least = -LARGEST_INTEGER
    if least is not None and most is not None and least > -most:
        raise BadNumber("minimum", "no integer between it and maximum can be kept exactly")
    found = {"minimum": least, "maximum": None if most is None else -most}
    return {keyword: value for keyword, value in found.items() if value is not None}


def _least_integer(bound: _Bound | None) -> int | None:
    if bound is None:
        return None
    return math.floor(bound.value) + 1 if bound.exclusive else math.ceil(bound.value)


def _as_double(least: int | None, keyword: str) -> int | None:
    """The least integer from `least` on that is a double and has 64 bits."""
    if least is None:
        return None
    if least > LARGEST_INTEGER:
        raise BadNumber(keyword, "integers of more than 63 bits cannot be kept exactly")
    double = float(max(least, -LARGEST_INTEGER))
    return int(double if int(double) >= least else math.nextafter(double, math.inf))


def _numbers(lower: _Bound | None, upper: _Bound | None, alone: bool) -> dict[str, Any]:
    lower = None if lower is None else _closed(_written(lower, "minimum"), upper, alone, "minimum")
    upper = None if upper is None else _closed(_written(upper, "maximum"), lower, alone, "maximum")
    if lower is not None and upper is not None and _is_empty(lower, upper):
        raise BadNumber("minimum", "no number between it and maximum can be kept exactly")
    found = {}
    if lower is not None:
        found["exclusiveMinimum" if lower.exclusive else "minimum"] = _double(lower.value)
    if upper is not None:
        found["exclusiveMaximum" if upper.exclusive else "maximum"] = -_double(upper.value) or 0.0
    return found


def _written(bound: _Bound, keyword: str) -> _Bound:
    """The least bound from `bound` on that the library writes as the decimal that it is."""
    if bound.value >= LARGEST_BOUND:
        raise BadNumber(keyword, f"numbers of {LARGEST_BOUND:.0e} and more cannot be kept exactly")
    if bound.value <= -LARGEST_BOUND:
        return _Bound(Fraction(-LARGEST_BOUND))
    scale = 10**MOST_DECIMALS
    value = Fraction(math.ceil(bound.value * scale), scale)
    double = float(value)
    while _exact(double) < value or not _is_read_exactly(double):
        double = math.nextafter(double, math.inf)
    return _Bound(_exact(double), bound.exclusive and _exact(double) == bound.value)


def _closed(bound: _Bound, other: _Bound | None, alone: bool, keyword: str) -> _Bound:
    """`bound`, but closed where the library would take it as closed: at a whole number that is exclusive, where the
    other end of the interval, or of one that it is intersected with, lies within 1 of it."""
    width = None if other is None else -other.value - bound.value
    if not bound.exclusive or bound.value < 0 or bound.value.denominator != 1:
        return bound
    if alone and (width is None or width >= 1):
        return bound
    gap = GAP if width is None or width >= 1 else _power_of_ten_below(width) / 10**RELATIVE_GAP
    return _written(_Bound(bound.value + gap), keyword)


def _power_of_ten_below(width: Fraction) -> Fraction:
    return Fraction(10) ** (len(str(width.numerator)) - len(str(width.denominator)) - 1)


def _double(value: Fraction) -> float:
    return float(value) + 0.0  # never -0.0


def _step(schema: Mapping[str, Any], only_integers: bool) -> int | float | None:
    value = schema.get("multipleOf")
    if value is None:
        return None
    if not _is_number(value) or value <= 0:
        raise BadNumber("multipleOf", "should be a number above 0")
    exact = _exact(value)
    if isinstance(value, float) and not _is_read_exactly(value):
        raise BadNumber("multipleOf", f"multiples of {value} cannot be kept exactly")
    if only_integers and exact.numerator == 1:
        return None
    if _as_a_step(value) != exact:
        raise BadNumber("multipleOf", f"multiples of {value} cannot be kept exactly")
    return value


def _has_multiple(bounds: Mapping[str, Any], step: Fraction, only_integers: bool) -> bool:
    """Whether a multiple of `step` lies within `bounds`, which the library does not see, and then leads nowhere."""
    step = Fraction(step.numerator) if only_integers else step
    least, most = (bounds.get(each, bounds.get(f"exclusive{each.capitalize()}")) for each in ("minimum", "maximum"))
    if least is None or most is None:
        return True
    multiple = math.ceil(_exact(least) / step) * step
    if "exclusiveMinimum" in bounds and multiple == _exact(least):
        multiple += step
    return multiple < _exact(most) or (multiple == _exact(most) and "maximum" in bounds)


def _as_a_step(value: float) -> Fraction | None:
    """It multiplies a double by 10 until it is whole, which rounds."""
    step, decimals = float(value), 0
    while step % 1 and decimals <= MOST_DECIMALS:
        step, decimals = step * 10, decimals + 1
    return Fraction(int(step), 10**decimals) if step <= LARGEST_STEP else None
