"""The phases of a TensorRT build as progress bars."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evla_compile.terminal import new_console


@contextmanager
def watching(trt: Any, config: Any, what: str, *, shown: bool) -> Iterator[None]:
    """Draw a progress bar for each phase of a build on standard error."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=new_console(stderr=True), transient=True, disable=not shown) as bar:
        config.progress_monitor = make_monitor(trt, bar, what)
        yield


def make_monitor(trt: Any, bar: Progress, what: str) -> Any:
    """Return the progress monitor that the library calls back; it draws on `bar`."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # the library is imported at run time
        """Shows every phase, indented below the phase that it belongs to."""

        def __init__(self) -> None:
            super().__init__()
            self._tasks: dict[str, Any] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            title = what if parent_phase is None else f"  {phase_name}"
            self._tasks[phase_name] = bar.add_task(title, total=num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            bar.update(self._tasks[phase_name], completed=step + 1)
            return True  # go on

        def phase_finish(self, phase_name: str) -> None:
            bar.remove_task(self._tasks.pop(phase_name))

    return Monitor()
