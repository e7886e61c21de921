"""`evla frames` and its output."""

import shlex
from pathlib import Path
from typing import Annotated

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from evla_compile.cli.arguments import read_path
from evla_compile.cli.console import new_table
from evla_compile.cli.recording_options import Camera, Episodes, Every, Task, selection_of
from evla_compile.recordings.frames_folder import CONTACT_SHEET, check_frames_folder, count_frames, writing_frames
from evla_compile.recordings.source import open_recording
from evla_compile.terminal import in_one_line, new_console

MOST_ROWS = 30
"""Instructions that are shown."""


def frames(
    source: Annotated[
        Path, typer.Argument(parser=read_path, metavar="SOURCE", help="LeRobotDataset, MCAP bag, or folder of bags.")
    ],
    out: Annotated[Path, typer.Option(parser=read_path, metavar="DIR", help="Folder for the frames, new or empty.")],
    camera: Camera = None,
    every: Every = 1,
    episodes: Episodes = None,
    instruction: Task = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Take greyscale, palette and opaque RGBA frames as RGB.")
    ] = False,
) -> None:
    """Write frames of a recording to a folder for calibration, with a contact sheet; imports no torch."""
    selection = selection_of(camera, every, episodes, instruction)
    check_frames_folder(out)
    recording = open_recording(source, selection, convert=convert)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=new_console(stderr=True), transient=True) as bar, writing_frames(out) as writer:
        task = bar.add_task("frames", total=recording.count)
        for frame in recording.frames:
            writer.add(frame)
            bar.advance(task)
    console = new_console()
    console.print(instruction_table(out, f"{recording.kind}, {in_one_line(recording.camera)}"))
    folder = shlex.quote(str(out))
    lines = [
        f"Written to {out}: {recording.count:,} frames. Look at {out / CONTACT_SHEET}. Next:",
        f"  evla compile RUN_DIR --calibration {folder} --out ARTIFACT",
    ]
    console.print("\n".join(lines), soft_wrap=True)


def instruction_table(folder: Path, title: str) -> Table:
    """Return how many frames and episodes each instruction of a folder has."""
    table = new_table(title, "instruction", right=("frames", "episodes"))
    found = count_frames(folder)
    for instruction, files in list(found.items())[:MOST_ROWS]:
        table.add_row(in_one_line(instruction), f"{len(files):,}", f"{len({file.episode for file in files}):,}")
    if len(found) > MOST_ROWS:
        rest = [file for files in list(found.values())[MOST_ROWS:] for file in files]
        table.add_row(f"{len(found) - MOST_ROWS} more", f"{len(rest):,}", f"{len({file.episode for file in rest}):,}")
    return table
