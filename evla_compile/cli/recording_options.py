"""The options that choose frames of a recording, shared by all commands that take one, and how a command reads them."""

from pathlib import Path
from typing import Annotated

import typer

from evla_compile.cli.console import step
from evla_compile.errors import CalibrationError
from evla_compile.host.frames import LISTING, Frame, read_frames
from evla_compile.recordings.selection import Selection, parse_episodes
from evla_compile.recordings.source import collect, open_recording, source_kind
from evla_compile.terminal import printable

Camera = Annotated[
    str | None,
    typer.Option(metavar="KEY|TOPIC", help="Camera of a dataset or image topic of a bag, if it has several."),
]
Every = Annotated[int, typer.Option(min=1, metavar="K", help="Take every K-th frame of a dataset or bag.")]
Episodes = Annotated[
    str | None, typer.Option(metavar="LIST", help="Take these episodes of a dataset, or these bags: 0-4,7.")
]
Task = Annotated[str | None, typer.Option(help="The task in words, in place of what a dataset says; a bag needs it.")]


def selection_of(camera: str | None, every: int, episodes: str | None, instruction: str | None) -> Selection:
    """Return what the options choose.

    Raises:
        ValueError: a text is malformed; the message names the option and the forms that it takes.
    """
    indices = None
    if episodes is not None:
        try:
            indices = parse_episodes(episodes)
        except ValueError as error:
            raise ValueError(f"--episodes: {error}") from error
    return Selection(camera=camera, every=every, episodes=indices, instruction=instruction)


def read_source(path: Path, selection: Selection, *, convert: bool) -> list[Frame]:
    """Return the observations of a folder with `frames.jsonl`, of a dataset or of a bag.

    Raises:
        ValueError: options for recordings were given, and the path is a folder of frames.
        CalibrationError: the source is missing or malformed, or does not have what was asked for.
    """
    if not is_recording(path):
        refuse_selection(selection, f"{path} lists its frames itself")
        return read_frames(path, convert=convert)
    recording = open_recording(path, selection, convert=convert)
    with step(f"decode {recording.count:,} frames of {printable(recording.camera)} of the {recording.kind}"):
        return collect(recording)


def is_recording(path: Path) -> bool:
    """Tell a recording from a folder of frames.

    Raises:
        CalibrationError: the path is neither.
    """
    kind = source_kind(path)
    if kind == "unknown":
        raise CalibrationError(
            f"{path} {'is no source of frames' if path.exists() else 'does not exist'}: expected a folder with"
            f" {LISTING}, a LeRobotDataset's folder, or an MCAP file or a folder of them"
        )
    return kind != "frames"


def refuse_selection(selection: Selection, why: str) -> None:
    """Refuse options for recordings where there is no recording.

    Raises:
        ValueError: one was given.
    """
    given = [
        option
        for option, value in (
            ("--camera", selection.camera),
            ("--every", selection.every if selection.every > 1 else None),
            ("--episodes", selection.episodes),
            ("--instruction", selection.instruction),
        )
        if value is not None
    ]
    if given:
        raise ValueError(f"{', '.join(given)}: for a LeRobotDataset or a bag, and {why}; leave it out")
