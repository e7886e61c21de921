"""Progress, tables and JSON output for all commands."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from evla_compile.json_text import to_json_text
from evla_compile.terminal import new_console, printable


@contextmanager
def step(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Show on standard error what is being done, and at the end how long it took."""
    console, start = new_console(stderr=True), perf_counter()
    with console.status(Text(printable(what))) if spinner else nullcontext():
        yield
    console.print(f"{perf_counter() - start:6.1f} s  {what}", style="dim", soft_wrap=True)


def new_table(title: str | None, *left: str, right: Sequence[str] = ()) -> Table:
    """Return an empty table with columns of text, that may fold, and columns of numbers at the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def print_json(value: Any) -> None:
    """Print a value as one line of JSON in ASCII.

    Raises:
        ValueError: it contains a number that is not finite, which JSON does not have.
    """
    text = to_json_text(value).replace("\x7f", "\\u007f")
    new_console().out(text)
