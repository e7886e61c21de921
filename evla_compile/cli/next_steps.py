"""What to do with a compiled policy, printed as commands."""

import shlex
from collections.abc import Collection
from pathlib import Path

from evla_compile.terminal import new_console


def print_next(
    artifact: Path,
    datasets: Collection[str],
    *,
    image: Path | str = "FRAME.png",
    instruction: str = "pick up the apple",
) -> None:
    """Print where an artifact is, and the commands that verify and run it."""
    key = f" --unnorm-key {shlex.quote(min(datasets))}" if len(datasets) > 1 else ""
    folder, picture, words = (shlex.quote(str(said)) for said in (artifact, image, instruction))
    new_console().print(
        f"\nWritten to {artifact}. Next:\n  evla verify {folder}\n"
        f"  evla run {folder} --image {picture} --instruction {words}{key}",
        soft_wrap=True,
    )
