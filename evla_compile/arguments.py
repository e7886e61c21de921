"""Arguments of the public functions: what was meant becomes a plain Python value, what was not is named; no torch.

Callers hold numbers in numpy's types as often as in Python's, and booleans pass for whole numbers in both: every
setting goes through here, so that both are treated alike everywhere.
"""

from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, TypeGuard

import numpy as np


def whole_number(
    name: str, value: object, *, low: int, high: int | None = None, of: str = "", otherwise: str = ""
) -> int:
    """Return a whole number as an int; numpy's integers will do, booleans and whole floats will not.

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
    """Return a real number as a float; numpy's numbers will do, booleans will not.

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


def is_whole(value: object) -> TypeGuard[int]:
    """Tell whether a value is a whole number of Python's or numpy's; booleans and whole floats are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def is_real(value: object) -> TypeGuard[float]:
    """Tell whether a value is a real number of Python's or numpy's; booleans are none, NaN and infinities are."""
    return isinstance(value, Real) and not isinstance(value, bool)


def lone_surrogate(text: str) -> str | None:
    """Return the first half of a character without its other half, which UTF-8 cannot write; None where all are whole.

    A decoder that hides undecodable bytes leaves such halves in a text, and JSON may spell them out.
    """
    return next((character for character in text if "\ud800" <= character <= "\udfff"), None)


def is_listed(value: object) -> TypeGuard[Sequence[Any]]:
    """Tell whether a value is a list of values: a list, tuple, range or numpy array [N,...]; text and bytes are not."""
    if isinstance(value, np.ndarray):
        return value.ndim > 0
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray | memoryview)
