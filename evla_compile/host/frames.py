"""Read observations from files: a folder with `frames.jsonl`, or images with one instruction; no torch."""

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

from evla_compile.arguments import is_whole, lone_surrogate
from evla_compile.errors import CalibrationError
from evla_compile.host.camera_frame import CameraFrame
from evla_compile.host.image_file import IMAGE_SUFFIXES, read_image

LISTING = "frames.jsonl"
"""File that lists the observations of a folder."""


class _Pair(NamedTuple):
    image: CameraFrame
    instruction: str


class Frame(_Pair):
    """One observation: an (image, instruction) pair that may know its episode.

    Attributes:
        image: camera frame, 8-bit RGB of any size.
        instruction: the task in words.
        episode: the recorded episode that it comes from; None if unknown. Frames of one episode are alike, so a repair
            is never judged on frames of an episode that it was fitted on.
    """

    episode: str | None

    def __new__(cls, image: CameraFrame, instruction: str, episode: str | None = None) -> Self:
        """Return a pair with an episode beside it."""
        frame = super().__new__(cls, image, instruction)
        frame.episode = episode
        return frame


@dataclass(frozen=True, kw_only=True, slots=True)
class FrameFile:
    """One observation whose image has not been read yet."""

    image: Path
    """The image file."""
    instruction: str
    """The task in words."""
    episode: str | None = None
    """The episode that it comes from; None if unknown."""
    place: str = ""
    """File and line of the listing; empty without one."""

    def read(self, *, convert: bool = False) -> Frame:
        """Read the image; see `read_image`.

        Raises:
            CalibrationError: the image of a listing is refused; the message names the line.
            ValueError: an image without a listing is refused.
        """
        try:
            return Frame(read_image(self.image, convert=convert), self.instruction, self.episode)
        except ValueError as error:
            if not self.place:
                raise
            raise CalibrationError(f"{self.place}: {error}") from error


def as_frames(frames: Iterable[Frame]) -> list[Frame]:
    """Return observations as a list of `Frame`; other (image, instruction) pairs are converted.

    Raises:
        ValueError: `frames` is a path, or an element is no (image, instruction) pair.
    """
    if isinstance(frames, str | bytes | os.PathLike):
        raise ValueError(f"the frames are {frames!r}: expected observations; evla_compile.read_frames(path) reads them")
    found = []
    for number, pair in enumerate(frames):
        if not isinstance(pair, tuple | list) or len(pair) != len(Frame._fields):
            raise ValueError(f"frame {number} is a {type(pair).__name__}: expected an (image, instruction) pair")
        found.append(pair if isinstance(pair, Frame) else Frame(*pair))
    return found


def read_frames(folder: str | os.PathLike[str], *, convert: bool = False) -> list[Frame]:
    """Read the observations of a folder: `frames.jsonl`, lines {"image": path, "instruction": text, "episode": name}.

    The episode, a text or a whole number, may be left out; see `Frame.episode`.

    Args:
        folder: the folder, or its `frames.jsonl`.
        convert: accept greyscale, palette and opaque RGBA files too; see `read_image`.

    Raises:
        CalibrationError: the folder or an image is missing or unreadable, or a line is malformed; the message names it.
    """
    return [frame.read(convert=convert) for frame in list_frames(folder)]


def list_frames(folder: str | os.PathLike[str]) -> list[FrameFile]:
    """Return the observations of a folder, their images unread; see `read_frames`.

    Raises:
        CalibrationError: the listing is missing, empty or unreadable, or a line is malformed; the message names it.
    """
    given = Path(folder)
    listing = given if given.name == LISTING and not given.is_dir() else given / LISTING
    try:
        lines = listing.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f'{listing} cannot be read ({error}): expected lines {{"image": "0.png", "instruction": "pick coke can"}}'
        ) from error
    frames = [_parse(listing, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not frames:
        raise CalibrationError(f"{listing} is empty: expected at least one observation")
    return frames


def list_images(place: Path, instruction: str) -> list[FrameFile]:
    """Return an image file, or every image of a folder in the order of their names, with one instruction for all.

    Raises:
        ValueError: the folder has no image.
    """
    if not place.is_dir():
        return [FrameFile(image=place, instruction=instruction)]
    files = sorted(file for file in place.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not files:
        raise ValueError(f"{place} holds no image: expected files that end in {', '.join(IMAGE_SUFFIXES)}")
    return [FrameFile(image=file, instruction=instruction) for file in files]


def _parse(listing: Path, number: int, line: str) -> FrameFile:
    place = f"{listing}:{number}"
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place}: not JSON ({error})") from error
    name, instruction = (entry.get("image"), entry.get("instruction")) if isinstance(entry, dict) else (None, None)
    if not isinstance(name, str) or not name or not isinstance(instruction, str) or not instruction:
        raise CalibrationError(f'{place}: expected {{"image": path, "instruction": text}}, found {line[:80]}')
    half = lone_surrogate(instruction)
    if half is not None:
        raise CalibrationError(
            f"{place}: instruction {instruction!r:.80} holds {half!r}, half of a character: expected whole ones"
        )
    episode = entry.get("episode")
    if episode is not None and not is_whole(episode) and not (isinstance(episode, str) and episode):
        raise CalibrationError(f'{place}: "episode" is {episode!r:.80}, expected a text or a whole number')
    return FrameFile(
        image=listing.parent / name,
        instruction=instruction,
        episode=None if episode is None else str(episode),
        place=place,
    )
