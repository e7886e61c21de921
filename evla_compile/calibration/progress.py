"""The progress bar of a calibration: one line for what it does at the time."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from evla_compile.terminal import new_console


class CalibrationProgress:
    """Draws how far each step of a calibration is."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar

    def say(self, text: str) -> None:
        """Print a line above the bar, where one is drawn."""
        if not self._bar.disable:
            self._bar.console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)

    def step(self, text: str, total: int) -> Callable[[], None]:
        """Begin a step, which hides the one before, and return what is called when a part of it is done."""
        for earlier in self._bar.tasks:
            self._bar.update(earlier.id, visible=False)
        task = self._bar.add_task(text, total=total)
        return lambda: self._bar.advance(task)


@contextmanager
def drawing_progress(*, wanted: bool) -> Iterator[CalibrationProgress]:
    """Draw progress on standard error within a `with` block, where it is wanted."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=new_console(stderr=True), transient=True, disable=not wanted) as bar:
        yield CalibrationProgress(bar)
