"""Prepare the standard streams: closed, full and broken ones end in a message or an exit status."""

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

from evla_compile.terminal import PIPE_CLOSED, discard


@contextmanager
def standard_streams() -> Iterator[None]:
    """Let standard output and error print any text, and exit silently where the reader of an output has gone.

    Raises:
        ValueError: standard output is closed.
        SystemExit: the reader of an output has gone.
    """
    if sys.stderr is None:  # otherwise the next file that is opened gets its descriptor, and errors are written into it
        sys.stderr = _nowhere(2)
    if sys.stdout is None:
        sys.stdout = _nowhere(1)
        raise ValueError("standard output is closed: expected a terminal, a file or a pipe; discard it with >/dev/null")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
    except BrokenPipeError:
        raise SystemExit(PIPE_CLOSED) from None
    finally:
        for stream in (sys.stdout, sys.stderr):
            _give_up_unwritten(stream)


def _nowhere(descriptor: int) -> TextIO:
    discard(descriptor)
    return open(descriptor, "w", encoding="utf-8", closefd=False)


def _give_up_unwritten(stream: TextIO) -> None:
    """Discard the buffer of a stream that cannot be written to: the interpreter would report it again at exit."""
    try:
        stream.flush()
    except OSError:
        discard(stream.fileno())
        stream.flush()
