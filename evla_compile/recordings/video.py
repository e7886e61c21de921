"""Decode single frames of a video file by their times, one after the other; no torch."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from evla_compile.errors import CalibrationError
from evla_compile.host.camera_frame import MOST_PIXELS
from evla_compile.recordings.recording import import_extra


def frames_at(file: Path, times: Sequence[float], tolerance: float) -> Iterator[Image.Image]:
    """Yield the frame of a video that is nearest to each time, as an image of mode RGB.

    The file is decoded from the key frame before the first time up to the last one, and never in memory as a whole.

    Args:
        file: an MP4 file.
        times: ascending times in seconds, on the clock of the video's own time stamps.
        tolerance: how far the nearest frame may be, in seconds.

    Raises:
        CalibrationError: the file cannot be decoded, is greyscale, or has no frame near a time.
    """
    av = import_extra("av", "datasets", "a LeRobotDataset's video")
    try:
        # An open file and a fixed format: a playlist in place of the video could name other files and addresses.
        with file.open("rb") as source, av.open(source, format="mp4", metadata_errors="replace") as container:
            for time, frame in _nearest(_decoded(file, container, times[0]), file, times, tolerance):
                if frame.is_corrupt:
                    raise CalibrationError(f"{file} is damaged at {time:.3f} s: download the dataset again")
                yield frame.to_image()
    except (av.FFmpegError, OSError, ValueError, ArithmeticError) as error:
        raise CalibrationError(
            f"{file} cannot be decoded ({error!s:.200}): expected an MP4 video; download the whole dataset, or leave"
            " the episode out"
        ) from error


def _decoded(file: Path, container: Any, start: float) -> Iterator[tuple[float, Any]]:
    """Yield times in seconds and frames in their order, from a key frame at or before `start` on."""
    if not container.streams.video:
        raise CalibrationError(f"{file} has no video stream: expected an MP4 video of a camera")
    stream = container.streams.video[0]
    if not stream.time_base:
        raise CalibrationError(f"{file} has a video stream without a clock: download the dataset again")
    container.seek(max(int(start / stream.time_base), 0), stream=stream)
    for frame in container.decode(stream):
        if frame.width * frame.height > MOST_PIXELS:
            raise CalibrationError(
                f"{file} has frames of {frame.width} x {frame.height} pixels: expected {MOST_PIXELS:,} at most"
            )
        if len(frame.format.components) < 3:
            raise CalibrationError(
                f"{file} is greyscale or depth ({frame.format.name}): expected a colour camera; choose another one"
            )
        if frame.time is None:
            raise CalibrationError(f"{file} has a frame without a time stamp: expected one on every frame")
        yield frame.time, frame


def _nearest(
    decoded: Iterator[tuple[float, Any]], file: Path, times: Sequence[float], tolerance: float
) -> Iterator[tuple[float, Any]]:
    before, after = None, next(decoded, None)
    for time in times:
        while after is not None and after[0] < time:
            before, after = after, next(decoded, None)
        around = [found for found in (before, after) if found is not None]
        best = min(around, key=lambda found: abs(found[0] - time), default=None)
        if best is None or abs(best[0] - time) > tolerance:
            where = "it has no frames" if best is None else f"the nearest one is at {best[0]:.3f} s"
            raise CalibrationError(
                f"{file} has no frame at {time:.3f} s, where the dataset says that one is: {where}; the video is cut"
                " off or belongs to another recording: download the dataset again, or leave the episode out"
            )
        yield best
