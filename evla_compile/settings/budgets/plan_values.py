"""Values of a plan's JSON to Python's, each refused by name where it is malformed; no torch."""

import re
import sys
from collections.abc import Sequence
from itertools import pairwise

MAX_NAMED = 100_000
"""Neurons in a layer, or named numbers, that a plan may have: beyond any decoder, and soon read."""


def index(value: object) -> int:
    """Return a whole number from 0 up.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r}: expected a whole number from 0 up")
    return value


def score(value: object) -> float:
    """Return a finite number as a float; JSON writers print 1.0 as 1.

    Raises:
        ValueError: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"importance {value!r:.40}: expected a finite number")
    return float(value)


def ascending(indices: Sequence[int]) -> tuple[int, ...]:
    """Return indices as a tuple.

    Raises:
        ValueError: there are none, or they do not ascend.
    """
    if not indices or any(first >= second for first, second in pairwise(indices)):
        raise ValueError(f"indices {indices!s:.60}: expected at least one, in ascending order")
    return tuple(indices)


def to_runs(indices: Sequence[int]) -> str:
    """Return ascending indices as text, "0-3,5,7-20"."""
    runs: list[list[int]] = []
    for place in indices:
        if runs and place == runs[-1][1] + 1:
            runs[-1][1] = place
        else:
            runs.append([place, place])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def from_runs(text: object) -> tuple[int, ...]:
    """Read `to_runs`'s form back.

    Raises:
        ValueError: it is malformed, or names more than `MAX_NAMED` indices.
    """
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text, re.ASCII):
        raise ValueError(f'{text!r:.60}: expected runs of neurons such as "0-3,5,7-20"')
    found: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
        if len(found) > MAX_NAMED:
            raise ValueError(f"{len(found)} neurons in a layer: expected at most {MAX_NAMED}")
    return ascending(found)
