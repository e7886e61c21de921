"""What every text goes through on its way to a terminal: control characters become escapes; no torch."""

import os
import re
import unicodedata
from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

PIPE_CLOSED = 141
"""Exit status where the reader of an output has gone: 128 and the number of SIGPIPE, which ends other tools then."""

_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # controls, formats such as bidirectional overrides, surrogates, separators
_KEPT = "\n\t\u200c\u200d"  # the joiners are letters' business in Persian, in Indic scripts and in emoji
_LINE_BREAKS = re.compile(r"[\n\t]")


def printable(text: str) -> str:
    r"""Return `text` with what would steer a terminal, reorder a line or fail to encode as Python's escapes, `\x1b`.

    Line breaks and tabs stay; see `in_one_line`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escaped(char) if unicodedata.category(char) in _HIDDEN and char not in _KEPT else char for char in text
    )


def in_one_line(text: str) -> str:
    """Return `printable` text whose line breaks and tabs are escapes too: a name cannot pass for lines of our own."""
    return _LINE_BREAKS.sub(lambda found: _escaped(found[0]), printable(text))


def new_console(*, stderr: bool = False) -> Console:
    """Return a console that prints what it is given: brackets are no markup, control characters do nothing."""
    return _PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


def _is_hidden(char: str) -> bool:
    return char not in _KEPT and unicodedata.category(char) in _HIDDEN


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class _PlainConsole(Console):
    """A console for texts of others; colours and progress are its own."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return a text as what `printable` makes of it; tables measure their columns by it."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments whose text is `printable`, from whatever it was made."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """Leave as other tools do where nobody reads on.

        Raises:
            SystemExit: always, with `PIPE_CLOSED`.
        """
        self.quiet = True
        discard(self.file.fileno())
        raise SystemExit(PIPE_CLOSED)


def discard(descriptor: int) -> None:
    """Send what is written to a file descriptor to nowhere: the interpreter's last flush would fail once more."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)
