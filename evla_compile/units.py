"""Format sizes, counts of operations and times with units for people; all printed ones are formatted here.

A small policy has kilobytes and microseconds where CogACT has gigabytes and milliseconds, so units follow the values.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

_PREFIXES = ("", "k", "M", "G")
_TIMES = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6), ("ns", 1e-9))


@dataclass(frozen=True, kw_only=True, slots=True)
class Scale:
    """A unit that suits a column of values."""

    unit: str
    """The unit with its prefix, such as `MB`."""
    size: float
    """One of it in base units."""

    def show(self, value: float) -> str:
        """Return a value, given in base units, as `digits` of this unit."""
        return digits(value / self.size)


def byte_scale(values: Iterable[float]) -> Scale:
    """Return B, kB, MB or GB, whichever suits the largest value, in bytes."""
    return _prefixed("B", values)


def flop_scale(values: Iterable[float]) -> Scale:
    """Return FLOP, kFLOP, MFLOP or GFLOP, whichever suits the largest value, in floating-point operations."""
    return _prefixed("FLOP", values)


def time_scale(values: Iterable[float]) -> Scale:
    """Return ms, us or ns, whichever suits the largest value, in seconds; latencies of seconds are read in ms too."""
    largest = max(values, default=0.0)
    return next(
        (Scale(unit=unit, size=size) for unit, size in _TIMES[1:] if largest >= size),
        Scale(unit="ms" if largest == 0 else "ns", size=1e-3 if largest == 0 else 1e-9),
    )


def digits(value: float) -> str:
    """Return a value with three significant digits, but all digits before the point; only 0 is shown as "0"."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    decimals = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def bytes_text(count: float) -> str:
    """Return a number of bytes in the unit that suits it, with one decimal, such as `15.4 GB`."""
    scale = byte_scale((count,))
    return f"{count:.0f} B" if scale.unit == "B" else f"{count / scale.size:,.1f} {scale.unit}"


def _prefixed(unit: str, values: Iterable[float]) -> Scale:
    largest = max(values, default=0.0)
    exponent = min(len(_PREFIXES) - 1, max(0, math.floor(math.log10(largest) / 3))) if largest > 0 else 0
    return Scale(unit=f"{_PREFIXES[exponent]}{unit}", size=1000.0**exponent)
