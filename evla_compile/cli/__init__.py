"""The command line, `evla`: each command calls the public interface and prints the results."""

import sys

import typer

from evla_compile.cli import build, compile, demo, doctor, estimate, fidelity, frames, inspect, run, verify
from evla_compile.cli.streams import standard_streams
from evla_compile.errors import EvlaError
from evla_compile.scratch import exiting_on_sigterm
from evla_compile.terminal import new_console

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Compile CogACT robot policies by EfficientVLA's rewrites, and run them without torch.",
)
for _name, _command, _summary in (
    ("demo", demo.demo, "Compile, export, verify and run the package's small policy."),
    ("frames", frames.frames, "Write frames of a recording to a folder."),
    ("compile", compile.compile_policy, "Compile a policy to an artifact."),
    ("inspect", inspect.inspect, "Show what is in a checkpoint or an artifact."),
    ("estimate", estimate.estimate, "Compare budgets before downloading any weight."),
    ("run", run.run, "Predict actions from camera frames, without torch."),
    ("build", build.build, "Build the TensorRT engines of an artifact."),
    ("verify", verify.verify, "Prove that an artifact is what torch computed."),
    ("fidelity", fidelity.fidelity, "Measure how far a policy's actions are from the dense policy's."),
    ("doctor", doctor.doctor, "Check whether this machine can do a piece of work."),
):
    app.command(_name, short_help=_summary)(_command)


def main() -> None:
    """Run the command line; errors that a user can fix end in one message and exit status 2, without a traceback."""
    try:
        with exiting_on_sigterm(), standard_streams():
            app(prog_name="evla")
    except (EvlaError, ValueError, OSError) as error:
        # Long words such as paths are not broken, so that they can be copied.
        new_console(stderr=True).print(f"error: {error}", overflow="ignore", crop=False)
        sys.exit(2)
