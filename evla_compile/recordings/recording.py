"""A recording whose frames are chosen and not yet decoded; no torch."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame


@dataclass(frozen=True, kw_only=True, slots=True)
class Recording:
    """The chosen frames of a recording."""

    kind: str
    """What it is, for messages, such as "LeRobotDataset v3.0"."""
    camera: str
    """Image feature or topic that the frames are of."""
    count: int
    """Frames that were chosen."""
    frames: Iterator[Frame]
    """The frames, decoded one at a time and once; reading on may raise a `CalibrationError`."""


def import_extra(module: str, extra: str, what: str) -> Any:
    """Return a module that an optional dependency of this package brings.

    Args:
        module: its dotted name.
        extra: the optional dependency.
        what: what needs it, for the message.

    Raises:
        CalibrationError: it cannot be imported; the message has the command that installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise CalibrationError(
            f'{what} needs {module}, which cannot be imported ({error}): pip install "evla-compile[{extra}]"'
        ) from error


def some_of(names: list[str], most: int = 20) -> str:
    """Return names for a message, the first `most` of them."""
    shown = ", ".join(repr(name)[:80] for name in names[:most])
    return shown + (f" and {len(names) - most} more" if len(names) > most else "") if names else "none"
