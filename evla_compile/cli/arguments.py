"""Arguments that several commands share, and how paths among arguments are read."""

from pathlib import Path
from typing import Annotated

import typer


def read_place(text: str) -> str:
    """Return a path or an id on the Hugging Face hub.

    Raises:
        typer.BadParameter: it is empty, as an unset variable of a shell is.
    """
    if not text:
        raise typer.BadParameter("expected a path, found an empty text, which is no folder; is a shell variable unset?")
    return text


def read_path(text: str) -> Path:
    """Return a path; an empty one would silently be the current folder.

    Raises:
        typer.BadParameter: it is empty.
    """
    return Path(read_place(text))


RunDirectory = Annotated[
    str,
    typer.Argument(
        parser=read_place, metavar="RUN_DIR", help="CogACT run directory, its .pt file, or a Hugging Face id."
    ),
]
Artifact = Annotated[
    Path,
    typer.Argument(
        parser=read_path,
        metavar="DIR",
        help="Folder of a compiled policy, its .onnx file, or, to run and verify, a Hugging Face id.",
    ),
]
