"""A setting declared once: its default, its legal values, and its option on the command line; no torch."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

from evla_compile.arguments import number, whole_number

T = TypeVar("T")

KEPT = object()
"""What `Setting.off` is where a dense policy has the setting's default."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Setting:
    """What is known of a setting besides its type and default."""

    text: str
    """Help of its option, one sentence."""
    read: Callable[[str, Any], Any]
    """The setting's name and a given value to the plain value; ValueError if it is not legal."""
    off: Any = KEPT
    """Value with which the setting leaves the policy whole; `KEPT` where it needs none of its own."""
    parse: Callable[[str], Any] | None = None
    """Text of the option to a value, ValueError if it is malformed; None where the type of the setting tells."""
    metavar: str | None = None
    """What the option's help shows in place of a value, needed beside `parse`."""
    forms: str = ""
    """Forms that `parse` takes, for its refusal: "a count as in 56, or all"."""


def setting(
    default: T,
    *,
    text: str,
    read: Callable[[str, Any], Any],
    off: Any = KEPT,
    parse: Callable[[str], Any] | None = None,
    metavar: str | None = None,
    forms: str = "",
) -> T:
    """Declare a field of a `Settings` class; see `Setting`."""
    about = Setting(text=text, read=read, off=off, parse=parse, metavar=metavar, forms=forms)
    declared: T = field(default=default, metadata={"setting": about})
    return declared


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Base of frozen dataclasses whose fields are all declared by `setting`; `CompileConfig` is made of several.

    Without slots, since a class with several bases can have the slots of one only.

    Raises:
        ValueError: a setting is out of its range; the message names it, its value and the legal range.
    """

    def __post_init__(self) -> None:
        for name, about in settings_of(type(self)).items():
            object.__setattr__(self, name, about.read(name, getattr(self, name)))


def settings_of(kind: type[Settings]) -> dict[str, Setting]:
    """Return the settings of a class by name, in their order."""
    return {each.name: each.metadata["setting"] for each in fields(kind)}


def whole_from(low: int, high: int) -> Callable[[str, Any], int]:
    """Return a reader of whole numbers from `low` to `high`."""
    return lambda name, value: whole_number(name, value, low=low, high=high)


def number_from(low: float, high: float, *, low_open: bool = False) -> Callable[[str, Any], float]:
    """Return a reader of real numbers from `low`, itself illegal where it is open, to `high`."""
    return lambda name, value: number(name, value, low=low, high=high, low_open=low_open)


def one_of(choices: tuple[T, ...]) -> Callable[[str, Any], T]:
    """Return a reader of one of `choices`."""

    def read(name: str, value: Any) -> T:
        if value not in choices:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(map(str, choices))}")
        chosen: T = value
        return chosen

    return read
