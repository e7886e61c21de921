"""Make every text safe to print on a terminal: control characters become escapes; no torch."""

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
_KEPT = "\n\t\u200c\u200d"  # joiners, which Persian, Indic scripts and emoji need
_LINE_BREAKS = re.compile(r"[\n\t]")


def printable(text: str) -> str:
    r"""Return `text` with Python escapes such as `\x1b` for characters that control a terminal or cannot be encoded.

    Line breaks and tabs stay; see `in_one_line`.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        _escaped(char) if unicodedata.category(char) in _HIDDEN and char not in _KEPT else char for char in text
    )


def in_one_line(text: str) -> str:
    """Return `printable` text with line breaks and tabs as escapes too, so that a name cannot imitate further lines."""
    return _LINE_BREAKS.sub(lambda found: _escaped(found[0]), printable(text))


def new_console(*, stderr: bool = False) -> Console:
    """Return a console that prints text as it is: brackets are no markup, and control characters become escapes."""
    return _PlainConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


def _escaped(char: str) -> str:
    return char.encode("unicode_escape").decode("ascii")


class _PlainConsole(Console):
    """A console that makes untrusted text safe; colours and progress bars of rich still work."""

    def render_str(self, text: str, **settings: Any) -> Text:
        """Return `printable` text; tables measure their columns by it."""
        return super().render_str(printable(text), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Yield segments with `printable` text, whatever is rendered."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)

    def on_broken_pipe(self) -> NoReturn:
        """Exit as other tools do when the reader of their output has gone.

        Raises:
            SystemExit: always, with `PIPE_CLOSED`.
        """
        self.quiet = True
        discard(self.file.fileno())
        raise SystemExit(PIPE_CLOSED)


def discard(descriptor: int) -> None:
    """Redirect a file descriptor to the null device, since the interpreter's last flush would fail again."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    if nowhere != descriptor:
        os.close(nowhere)
