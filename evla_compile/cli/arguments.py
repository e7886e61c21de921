"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

RunDirectory = Annotated[
    str, typer.Argument(metavar="RUN_DIR", help="CogACT run directory, its .pt file, or a Hugging Face id.")
]


Artifact = Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a compiled policy, or its .onnx file.")]
