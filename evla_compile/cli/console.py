"""What every command prints with: consoles, progress, tables."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from time import perf_counter

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text


def new_console(*, stderr: bool = False) -> Console:
    """Return a console that prints what it is given: brackets in messages and instructions are no markup."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def step(what: str, *, spinner: bool = True) -> Iterator[None]:
    """Show on standard error what is being done, and after it how long it took."""
    console, start = new_console(stderr=True), perf_counter()
    with console.status(Text(what)) if spinner else nullcontext():
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
