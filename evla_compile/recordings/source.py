"""Tell what a source of observations is, and read it: a recording, or a folder with `frames.jsonl`; no torch."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

from evla_compile.errors import CalibrationError
from evla_compile.host.camera_frame import rgb_image
from evla_compile.host.frames import LISTING, Frame
from evla_compile.recordings.bag import find_bags, open_bags
from evla_compile.recordings.dataset_info import INFO
from evla_compile.recordings.lerobot import open_lerobot
from evla_compile.recordings.recording import Recording
from evla_compile.recordings.selection import Selection

SourceKind: TypeAlias = Literal["frames", "dataset", "bag", "unknown"]
"""What a source of observations is."""

MOST_FRAME_BYTES = 8_000_000_000
"""Bytes of the frames that are held in memory at a time."""


def source_kind(path: Path) -> SourceKind:
    """Tell what is at a path: a listing of frames, a LeRobotDataset, an MCAP bag or a folder of them, or neither."""
    if path.name == LISTING or (path / LISTING).exists():
        return "frames"
    if (path / INFO).exists():
        return "dataset"
    return "bag" if find_bags(path) else "unknown"


def open_recording(path: Path, selection: Selection, *, convert: bool = False) -> Recording:
    """Return the chosen frames of a LeRobotDataset or an MCAP bag, not yet decoded.

    Raises:
        CalibrationError: there is no recording at the path, or it is malformed or does not have what was asked for.
    """
    kind = source_kind(path)
    if kind == "dataset":
        return open_lerobot(path, selection, convert=convert)
    if kind == "bag":
        return open_bags(path, selection, convert=convert)
    found = f"has a {LISTING} already" if kind == "frames" else "is no recording" if path.exists() else "does not exist"
    raise CalibrationError(
        f"{path} {found}: expected a LeRobotDataset's folder, with its {INFO}, or an MCAP file or a folder of them;"
        " convert a bag of another format with ros2 bag convert"
    )


def read_recording(
    path: str | os.PathLike[str],
    *,
    camera: str | None = None,
    every: int = 1,
    episodes: Sequence[int] | None = None,
    instruction: str | None = None,
    convert: bool = False,
) -> list[Frame]:
    """Read observations of a LeRobotDataset (v2.0, v2.1 or v3.0) or of MCAP bags of ROS 2.

    It needs the optional dependency `datasets` or `mcap`. `evla frames` writes them to a folder instead.

    Args:
        path: the dataset's folder, an MCAP file, a folder that `ros2 bag record` wrote, or a folder of those.
        camera: image feature of a dataset, or image topic of a bag; may be left out where there is just one.
        every: take one frame of this many, from the first frame of each episode on.
        episodes: indices of the episodes; of several bags, counted from 0 in the order of their names. None for all.
        instruction: the task in words for all frames, in place of what was recorded; a bag needs one.
        convert: accept greyscale, palette and opaque RGBA images too; see `read_image`.

    Returns:
        Frames with their episode's index, or the bag's name.

    Raises:
        CalibrationError: a library or a file is missing, a file is malformed, or the recording does not have what was
            asked for; the message says what it has.
        ValueError: an argument is out of its range.
    """
    indices = None if episodes is None else tuple(episodes)
    selection = Selection(camera=camera, every=every, episodes=indices, instruction=instruction)
    return collect(open_recording(Path(path), selection, convert=convert))


def collect(recording: Recording) -> list[Frame]:
    """Return the frames of a recording.

    Raises:
        CalibrationError: they do not fit in `MOST_FRAME_BYTES`, or one cannot be decoded.
    """
    frames: list[Frame] = []
    for frame in recording.frames:
        if not frames:
            _check_memory(frame, recording.count)
        frames.append(frame)
    return frames


def _check_memory(frame: Frame, count: int) -> None:
    width, height = rgb_image(frame.image).size
    needed = width * height * 3 * count
    if needed > MOST_FRAME_BYTES:
        raise CalibrationError(
            f"{count:,} frames of {width} x {height} pixels take {needed / 1e9:.1f} GB, more than"
            f" {MOST_FRAME_BYTES / 1e9:.0f}: take fewer with --every or --episodes (every=, episodes= in Python)"
        )
