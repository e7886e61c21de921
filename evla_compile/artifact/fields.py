"""Read fields of untrusted JSON: present and of the expected type, or an error that names the field; no torch."""

from collections.abc import Mapping
from typing import Any, TypeVar

_JSON_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
_Json = TypeVar("_Json", dict[str, Any], list[Any], str, int, bool)


def value_at(data: Mapping[str, Any], key: str, kind: type[_Json]) -> _Json:
    """Return the field `key`, of exactly this kind.

    Raises:
        ValueError: it is missing or of another kind; the message names it.
    """
    if key not in data:
        raise ValueError(f"{key!r} is missing")
    value = data[key]
    # The exact type: isinstance would let JSON's true and false pass as whole numbers.
    if type(value) is not kind:
        raise ValueError(f"{key!r} is {value!r:.80}: expected {_JSON_WORDS[kind]}")
    return value


def objects_at(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    """Return the field `key`, a list of objects.

    Raises:
        ValueError: it is missing, no list, or a list of something else; the message names it.
    """
    entries = value_at(data, key, list)
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{key!r} holds {entry!r:.80}: expected objects")
    return entries
