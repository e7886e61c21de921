"""Inputs of `evla run`: frames with their instructions, noise, the file for the actions."""

from pathlib import Path
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from evla_compile.host.frames import FrameFile, list_frames, list_images


def list_observations(image: Path | None, instruction: str | None, frames: Path | None) -> list[FrameFile]:
    """Return the observations that the options name, their images unread.

    Raises:
        ValueError: not exactly one of --image and --frames was given, or --instruction does not go with it.
        CalibrationError: the listing of --frames is missing or malformed.
    """
    if (image is None) == (frames is None):
        raise ValueError("expected either --image FILE|DIR with --instruction, or --frames FRAMES, which has its own")
    if frames is not None:
        if instruction is not None:
            raise ValueError("--instruction beside --frames: its frames.jsonl has the instructions; leave one out")
        return list_frames(frames)
    if image is None or instruction is None:
        raise ValueError("--image without --instruction: give the task in words, as in --instruction 'open it'")
    return list_images(image, instruction)


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
