"""Write JSON, refusing numbers that JSON does not have; all JSON of the package is written here; no torch."""

import json
import math
from collections.abc import Mapping
from typing import Any


def to_json_text(value: Any, *, indent: int | None = None, sort_keys: bool = False) -> str:
    """Return a value as JSON.

    By default Python writes NaN and infinities as words that other JSON readers refuse.

    Args:
        value: any value that `json.dumps` accepts.
        indent: columns to indent by; None for a single line.
        sort_keys: whether the keys of objects are sorted, so that equal values give equal texts.

    Raises:
        ValueError: a number is not finite; the message says where it is.
    """
    try:
        return json.dumps(value, indent=indent, sort_keys=sort_keys, allow_nan=False)
    except ValueError as error:
        found = _not_finite(value, "")
        if found is None:
            raise
        place, number = found
        raise ValueError(
            f"{place or 'the value'} is {number}, which JSON cannot hold: expected finite numbers"
        ) from error


def _not_finite(value: object, place: str) -> tuple[str, float] | None:
    """Return where the first number that is not finite is, as `key.key[index]`, and the number."""
    if isinstance(value, float):
        return None if math.isfinite(value) else (place, value)
    children: list[tuple[str, object]] = []
    if isinstance(value, Mapping):
        children = [(f"{place}.{key}" if place else str(key), child) for key, child in value.items()]
    elif isinstance(value, list | tuple):
        children = [(f"{place}[{index}]", child) for index, child in enumerate(value)]
    return next((found for path, child in children if (found := _not_finite(child, path)) is not None), None)
