"""Folders of frames: read as they were written, whole or not at all; contact sheets; texts that name episodes."""

import logging
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame, read_frames
from evla_compile.recordings.contact_sheet import CELL, draw_contact_sheet, evenly_spread
from evla_compile.recordings.frames_folder import CONTACT_SHEET, writing_frames
from evla_compile.recordings.selection import parse_episodes
from tests.recordings.written import source_frame

FRAMES = [
    Frame(source_frame(0, 0), "open the door", "0"),
    Frame(source_frame(1, 1), "mach die T\u00fcr auf\n", "night/2"),
    Frame(source_frame(1, 2), "close it"),
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("exists", [False, True])
def test_what_was_written_is_read(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "frames"
    if exists:
        folder.mkdir()
    with writing_frames(folder) as writer:
        for frame in FRAMES:
            writer.add(frame)
    assert names(tmp_path) == ["frames"]
    assert names(folder) == ["000000.png", "000001.png", "000002.png", CONTACT_SHEET, "frames.jsonl"]
    for found, expected in zip(read_frames(folder), FRAMES, strict=True):
        np.testing.assert_array_equal(np.asarray(found.image), np.asarray(expected.image))
        assert (found.instruction, found.episode) == (expected.instruction, expected.episode)


@pytest.mark.parametrize("error", [CalibrationError, KeyboardInterrupt, SystemExit])
def test_an_interrupted_run_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    def write() -> None:
        with writing_frames(tmp_path / "frames") as writer:
            writer.add(FRAMES[0])
            assert not (tmp_path / "frames").exists()
            raise error

    with pytest.raises(error):
        write()
    assert names(tmp_path) == []


def test_what_a_killed_run_left_is_no_folder_of_frames_and_goes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    left = tmp_path / ".frames.partial-0123abcd"
    (left / "new").mkdir(parents=True)
    (left / "lock").touch()
    with caplog.at_level(logging.WARNING), writing_frames(tmp_path / "frames") as writer:
        writer.add(FRAMES[0])
    assert names(tmp_path) == ["frames"]
    assert "left by a process that was killed" in caplog.text


def test_other_files_are_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    for name, message in (("full", "full is not empty"), ("file", "file is no folder"), ("link", "link is no folder")):
        with pytest.raises(CalibrationError, match=message), writing_frames(tmp_path / name):
            pytest.fail("the block was entered")
    with pytest.raises(CalibrationError, match=r"cannot be written: .*choose another --out"):
        writing_frames(tmp_path / "file" / "frames").__enter__()


def test_a_folder_that_is_filled_meanwhile_stays(tmp_path: Path) -> None:
    def write() -> None:
        with writing_frames(tmp_path / "frames") as writer:
            writer.add(FRAMES[0])
            (tmp_path / "frames").mkdir()
            (tmp_path / "frames" / "notes.txt").touch()

    with pytest.raises(CalibrationError, match="is not empty"):
        write()
    assert names(tmp_path / "frames") == ["notes.txt"]


def test_no_frames_are_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="has no frames"), writing_frames(tmp_path / "frames"):
        pass
    assert names(tmp_path) == []


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 3, 1), (8, 8, 1), (9, 8, 2), (64, 8, 8)])
def test_a_contact_sheet_is_a_grid(count: int, columns: int, rows: int) -> None:
    sheet = draw_contact_sheet([FRAMES[0]] * count)
    assert sheet.size == (columns * CELL[0], rows * CELL[1])


def test_a_contact_sheet_shows_each_frame_in_its_cell() -> None:
    colours = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    frames = [Frame(Image.new("RGB", (400, 100), colour), "a " * 400, "x" * 400) for colour in colours]
    pixels = np.asarray(draw_contact_sheet(frames))
    for number, colour in enumerate(colours):
        cell = pixels[:, number * CELL[0] : (number + 1) * CELL[0]]
        others = [other for other in colours if other != colour]
        assert (cell == colour).all(axis=-1).sum() == 168 * 42  # 400 x 100 at the width of a cell
        assert not any((cell == other).all(axis=-1).any() for other in others)
        assert (cell.max(axis=-1) < 100).any()  # the caption


def test_a_contact_sheet_has_frames_and_not_too_many() -> None:
    for frames in ([], [FRAMES[0]] * 65):
        with pytest.raises(ValueError, match="expected 1 to 64"):
            draw_contact_sheet(frames)


def test_frames_are_evenly_spread() -> None:
    assert evenly_spread(3) == [0, 1, 2]
    assert evenly_spread(10, 4) == [0, 3, 6, 9]
    assert len(set(evenly_spread(65))) == 64
    assert evenly_spread(1000)[-1] == 999


@pytest.mark.parametrize(
    ("text", "expected"), [("3", (3,)), ("0-4,7", (0, 1, 2, 3, 4, 7)), (" 7 , 2 - 3,3", (2, 3, 7)), ("5-5", (5,))]
)
def test_episodes_are_read(text: str, expected: tuple[int, ...]) -> None:
    assert parse_episodes(text) == expected


@pytest.mark.parametrize("text", ["", "a", "4-0", "-1", "1,", "1-2-3", "0-1000000", "0-99999999", "1.5"])
def test_malformed_episodes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected indices and spans that ascend, as in 0-4,7"):
        parse_episodes(text)
