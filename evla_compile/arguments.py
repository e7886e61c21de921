"""Check arguments of the public functions and convert them to plain Python values; no torch.

Callers pass numpy's numbers as often as Python's, and in both a boolean counts as a whole number. Every setting is
checked here, so that all are treated alike.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np


def whole_number(
    name: str, value: object, *, low: int, high: int | None = None, of: str = "", otherwise: str = ""
) -> int:
    """Return a whole number as an int; numpy's integers are accepted, booleans and whole floats are not.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        low: least legal value.
        high: largest legal value; None for no limit.
        of: the unit, for the message, such as "bytes".
        otherwise: what else is legal, for the message, such as "None".

    Raises:
        ValueError: it is of another type or out of its range; the message names it, its value and the legal range.
    """
    if is_whole(value) and low <= value and (high is None or value <= high):
        return int(value)
    kind = "a whole number" + (f" of {of}" if of else "")
    span = f"from {low}" + (f" to {high}" if high is not None else " up")
    raise ValueError(f"{name}={value!r}: expected {kind} {span}" + (f", or {otherwise}" if otherwise else ""))


def number(name: str, value: object, *, low: float, high: float, low_open: bool = False) -> float:
    """Return a real number as a float; numpy's numbers are accepted, booleans are not.

    Args:
        name: the argument's name, for the message.
        value: what was given.
        low: least legal value.
        high: largest legal value.
        low_open: whether `low` itself is illegal.

    Raises:
        ValueError: it is of another type or out of its range; the message names it, its value and the legal range.
    """
    # Compared before it is converted: a whole number may be too large for a float.
    if is_real(value) and low <= value <= high and not (low_open and value == low):
        return float(value)
    raise ValueError(f"{name}={value!r}: expected a number in {'(' if low_open else '['}{low}, {high}]")


def true_or_false(name: str, value: object) -> bool:
    """Return a truth value as a bool; numpy's are accepted, numbers are not.

    Args:
        name: the argument's name, for the message.
        value: what was given.

    Raises:
        ValueError: it is of another type; the message names it and its value.
    """
    if isinstance(value, bool | np.bool_):
        return bool(value)
    raise ValueError(f"{name}={value!r}: expected True or False")


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether a value is a whole number of Python or numpy; booleans and whole floats are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Tell whether a value is a real number of Python or numpy; NaN and infinities are, booleans are not."""
    return isinstance(value, Real) and not isinstance(value, bool)


def lone_surrogate(text: str) -> str | None:
    """Return the first lone surrogate of a text, which UTF-8 cannot encode; None where there is none.

    Python's "surrogateescape" decoding leaves them in a text, and JSON escapes can spell them.
    """
    return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def is_listed(value: object) -> TypeGuard[Sequence[Any]]:
    """Tell whether a value is a list of values: a list, tuple, range or numpy array [N,...]; text and bytes are not."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
