"""Print the commands to use a compiled policy with."""

import shlex
from collections.abc import Collection
from pathlib import Path

from evla_compile.host.camera_frame import Framing
from evla_compile.runtime.providers import is_widened
from evla_compile.settings.precision import Precision
from evla_compile.terminal import new_console


def print_next(
    artifact: Path,
    datasets: Collection[str],
    *,
    image: Path | str = "FRAME.png",
    instruction: str = "pick up the apple",
    batch_size: int = 1,
    framing: Framing = "whole",
    precision: Precision = "float32",
) -> None:
    """Print where an artifact is, and the commands that verify and run it; for a batch of several frames, Python code.

    For a precision that a CPU does not have, the command that builds an engine is printed too.
    """
    key = f" --unnorm-key {shlex.quote(min(datasets))}" if len(datasets) > 1 else ""
    if framing != "whole":
        key += f" --framing {framing}"
    folder, picture, words = (shlex.quote(str(argument)) for argument in (artifact, image, instruction))
    lines = [f"\nWritten to {artifact}. Next:", f"  evla verify {folder}"]
    if batch_size == 1:
        lines.append(f"  evla run {folder} --image {picture} --instruction {words}{key}")
    else:
        lines += [
            f"and in Python, since evla run gives one frame and this policy takes {batch_size} at a time:",
            *batch_example(artifact, datasets, image, instruction, batch_size=batch_size, framing=framing),
        ]
    if is_widened("cpu", precision):
        lines += [
            f"on a CPU in float32 arithmetic; an engine computes in {precision}:",
            f"  evla build {folder}",
        ]
    new_console().print("\n".join(lines), soft_wrap=True)


def batch_example(
    artifact: Path,
    datasets: Collection[str],
    image: Path | str,
    instruction: str,
    *,
    batch_size: int,
    framing: Framing,
) -> list[str]:
    """Return lines of Python that run a policy on a batch of frames, indented by two."""
    settings = f", unnorm_key={min(datasets)!r}" if len(datasets) > 1 else ""
    if framing != "whole":
        settings += f", framing={framing!r}"
    return [
        "  from evla_compile import runtime",
        "  from evla_compile.host.image_file import read_image",
        f"  frames = [read_image({str(image)!r})] * {batch_size}",
        f"  instructions = [{instruction!r}] * {batch_size}",
        f"  actions = runtime.load({str(artifact)!r}).predict_action(frames, instructions{settings})",
    ]
