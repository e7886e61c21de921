"""Write observations to a folder with `frames.jsonl`, its images and a contact sheet, whole or not at all; no torch.

The folder is written beside its place and renamed at the end, so an interrupted run leaves none.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evla_compile.errors import CalibrationError
from evla_compile.host.camera_frame import rgb_image
from evla_compile.host.frames import LISTING, Frame, FrameFile, list_frames
from evla_compile.json_text import to_json_text
from evla_compile.recordings.contact_sheet import draw_contact_sheet, evenly_spread
from evla_compile.scratch import new_folder, remove_stale, scratch

CONTACT_SHEET = "contact-sheet.png"
"""File of the contact sheet."""


class FramesWriter:
    """Writes frames one at a time; see `writing_frames`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lines: list[str] = []

    def add(self, frame: Frame) -> None:
        """Write a frame's image as PNG, pixel by pixel as it is."""
        name = f"{len(self._lines):06d}.png"
        rgb_image(frame.image).save(self._folder / name)
        episode = {} if frame.episode is None else {"episode": frame.episode}
        self._lines.append(to_json_text({"image": name, "instruction": frame.instruction, **episode}))

    def finish(self) -> None:
        """Write the listing and the contact sheet.

        Raises:
            CalibrationError: no frame was added.
        """
        if not self._lines:
            raise CalibrationError("the recording has no frames: expected one at least")
        (self._folder / LISTING).write_text("\n".join(self._lines) + "\n", encoding="utf-8")
        files = list_frames(self._folder)
        shown = [files[index].read() for index in evenly_spread(len(files))]
        draw_contact_sheet(shown).save(self._folder / CONTACT_SHEET)


def check_frames_folder(folder: Path) -> None:
    """Refuse a place that frames cannot be written to, before any work is done.

    Raises:
        CalibrationError: it is a file, or a folder that is not empty.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise CalibrationError(f"{folder} is no folder: expected a new or empty one; choose another --out")
    if folder.is_dir() and any(folder.iterdir()):
        raise CalibrationError(
            f"{folder} is not empty: expected a new or empty folder; choose another --out or remove it"
        )


@contextmanager
def writing_frames(folder: Path) -> Iterator[FramesWriter]:
    """Yield what writes frames to a folder, which takes its place only if the block succeeds.

    Raises:
        CalibrationError: the folder is refused by `check_frames_folder`, cannot be written, or no frame was added.
    """
    place = folder.absolute()
    check_frames_folder(place)
    try:
        remove_stale(place)
        with scratch(place) as beside:
            new = new_folder(beside)
            writer = FramesWriter(new)
            yield writer
            writer.finish()
            check_frames_folder(place)
            new.replace(place)
    except OSError as error:
        raise CalibrationError(
            f"{folder} cannot be written: {error}; expected {place.parent} to be a writable folder with enough space:"
            " choose another --out"
        ) from error


def count_frames(folder: Path) -> dict[str, list[FrameFile]]:
    """Return the frames of a folder by instruction.

    Raises:
        CalibrationError: see `list_frames`.
    """
    found: dict[str, list[FrameFile]] = {}
    for file in list_frames(folder):
        found.setdefault(file.instruction, []).append(file)
    return found
