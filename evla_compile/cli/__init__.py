"""The command line, `evla`: each command is a few calls of the public interface, and prints what they return."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer
from typer.core import TyperGroup

from evla_compile.cli import build, compile, demo, doctor, estimate, inspect, run, verify
from evla_compile.cli.streams import standard_streams
from evla_compile.errors import EvlaError
from evla_compile.terminal import new_console, printable

_UsageError: Any = typer.BadParameter.__base__  # typer offers one kind of it alone


class _Commands(TyperGroup):
    """The commands; what typer says of wrong usage quotes the command line, which may hold control characters."""

    def make_context(self, *arguments: Any, **settings: Any) -> Any:
        """Read the options in front of the command."""
        with _printable_usage_errors():
            return super().make_context(*arguments, **settings)

    def invoke(self, *arguments: Any) -> Any:
        """Read the options of the command and run it."""
        with _printable_usage_errors():
            return super().invoke(*arguments)


@contextmanager
def _printable_usage_errors() -> Iterator[None]:
    try:
        yield
    except _UsageError as error:
        error.message = printable(error.message)
        raise


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile CogACT robot policies by EfficientVLA's rewrites, and run them without torch.",
)
app.command("demo")(demo.demo)
app.command("compile")(compile.compile_policy)
app.command("inspect")(inspect.inspect)
app.command("estimate")(estimate.estimate)
app.command("run")(run.run)
app.command("build")(build.build)
app.command("verify")(verify.verify)
app.command("doctor")(doctor.doctor)


def main() -> None:
    """Run the command line; what a user can mend ends in one message and exit status 2, without a traceback."""
    try:
        with standard_streams():
            app(prog_name="evla")
    except (EvlaError, ValueError, OSError) as error:
        # Long words, paths among them, stay whole: they are there to be copied.
        new_console(stderr=True).print(f"error: {error}", overflow="ignore", crop=False)
        sys.exit(2)
