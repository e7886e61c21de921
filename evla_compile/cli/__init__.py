"""The command line, `evla`: each command is a few calls of the public interface, and prints what they return."""

import sys

import typer

from evla_compile.cli import build, compile, demo, doctor, estimate, inspect, run, verify
from evla_compile.cli.console import new_console
from evla_compile.errors import EvlaError

app = typer.Typer(
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
        app(prog_name="evla")
    except (EvlaError, ValueError, OSError) as error:
        # Long words, paths among them, stay whole: they are there to be copied.
        new_console(stderr=True).print(f"error: {error}", overflow="ignore", crop=False)
        sys.exit(2)
