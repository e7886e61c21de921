"""Inputs of `evla run`: frames with their instructions, noise, the file for the actions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from evla_compile.cli.recording_options import is_recording, read_source, refuse_selection
from evla_compile.host.frames import Frame, FrameFile, list_frames, list_images
from evla_compile.recordings.selection import Selection


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedFrame:
    """One observation of a recording, decoded."""

    frame: Frame
    """The observation."""
    image: str
    """Which one it is."""

    @property
    def instruction(self) -> str:
        """The task in words."""
        return self.frame.instruction

    def read(self, *, convert: bool = False) -> Frame:
        """Return the observation; it was converted when it was decoded."""
        return self.frame


def list_observations(
    image: Path | None, frames: Path | None, selection: Selection, *, convert: bool
) -> Sequence[FrameFile | RecordedFrame]:
    """Return the observations that the options name: images of files unread, frames of recordings decoded.

    Args:
        image: --image.
        frames: --frames.
        selection: --instruction, and the options for recordings.
        convert: take other colours of recorded frames as RGB.

    Raises:
        ValueError: not exactly one of --image and --frames was given, or other options do not go with it.
        CalibrationError: the listing or the recording of --frames is missing or malformed.
    """
    if (image is None) == (frames is None):
        raise ValueError("expected either --image FILE|DIR with --instruction, or --frames FRAMES, which has its own")
    if frames is not None and is_recording(frames):
        found = read_source(frames, selection, convert=convert)
        return [
            RecordedFrame(frame=frame, image=f"frame {number} of {frames}, episode {frame.episode}")
            for number, frame in enumerate(found)
        ]
    refuse_selection(replace(selection, instruction=None), "--image or --frames names no such recording")
    if frames is not None:
        if selection.instruction is not None:
            raise ValueError("--instruction beside --frames: its frames.jsonl has the instructions; leave one out")
        return list_frames(frames)
    if image is None or selection.instruction is None:
        raise ValueError("--image without --instruction: give the task in words, as in --instruction 'open it'")
    return list_images(image, selection.instruction)


def read_noise(file: Path, frames: int) -> list[NDArray[np.floating]]:
    """Return the noise of each frame: a file of rank 3 has one for each, one of rank 2 the same for all.

    Raises:
        ValueError: the file is no .npy file of numbers, or has noise for another number of frames.
    """
    try:
        noise = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError, BadZipFile) as error:
        raise ValueError(f"--noise {file} cannot be read ({error}): expected .npy, float [A,7] or [N,A,7]") from error
    if not isinstance(noise, np.ndarray) or noise.ndim not in (2, 3):
        found = f"shape {list(noise.shape)}" if isinstance(noise, np.ndarray) else "an archive"
        raise ValueError(f"--noise {file} holds {found}: expected one array, float [A,7] or [N,A,7]")
    if noise.ndim == 2:
        return [noise] * frames
    if len(noise) != frames:
        raise ValueError(f"--noise {file} has noise for {len(noise)} frames: expected {frames}, or [A,7] for all")
    return list(noise)


def check_actions_file(out: Path | None) -> None:
    """Refuse, before any call, a file for the actions that cannot be written.

    Raises:
        ValueError: it does not end in .npy, or its folder does not exist.
    """
    if out is not None and (out.suffix != ".npy" or not out.parent.is_dir() or out.is_dir()):
        raise ValueError(f"--out {out}: expected a file that ends in .npy, in a folder that exists")
