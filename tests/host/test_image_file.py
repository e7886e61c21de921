"""Image files as frames: what is taken, what is converted on request, what is refused."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evla_compile.host import camera_frame, image_file
from evla_compile.host.camera_frame import rgb_image
from evla_compile.host.frames import list_images, read_frames
from evla_compile.host.image_file import read_image

COLOURS = np.array([[[0, 0, 0], [9, 9, 9]], [[255, 255, 255], [77, 77, 77]]], dtype=np.uint8)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA"])
def test_converted_files_have_the_very_same_colours(tmp_path: Path, mode: str) -> None:
    Image.fromarray(COLOURS).convert(mode, palette=Image.Palette.ADAPTIVE).save(tmp_path / "frame.png")
    with pytest.raises(ValueError, match=rf"frame\.png is .*PIL mode '{mode}'.*--convert \(convert=True in Python\)"):
        read_image(tmp_path / "frame.png")
    read = read_image(tmp_path / "frame.png", convert=True)
    assert read.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(read), COLOURS)


def test_what_rgb_cannot_say_is_refused_all_the_same(tmp_path: Path) -> None:
    clear = Image.fromarray(COLOURS).convert("RGBA")
    clear.putpixel((0, 0), (1, 2, 3, 254))
    clear.save(tmp_path / "clear.png")
    Image.fromarray(COLOURS).convert("CMYK").save(tmp_path / "ink.jpg")
    for name, message in (("clear.png", "transparent pixels"), ("ink.jpg", "PIL mode 'CMYK': expected 8-bit RGB")):
        with pytest.raises(ValueError, match=message):
            read_image(tmp_path / name, convert=True)


def test_frames_are_converted_on_request(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).convert("L").save(tmp_path / "0.png")
    (tmp_path / "frames.jsonl").write_text('{"image": "0.png", "instruction": "go"}\n', encoding="utf-8")
    for place in (tmp_path, tmp_path / "frames.jsonl"):
        ((image, instruction),) = read_frames(place, convert=True)
        assert (np.asarray(image).tolist(), instruction) == (COLOURS.tolist(), "go")


@pytest.mark.parametrize("side", [(10_000, 10_000), (20_000, 10_000)])
def test_a_gigantic_image_meets_our_own_limit(tmp_path: Path, side: tuple[int, int]) -> None:
    Image.new("1", side).save(tmp_path / "large.png")  # beyond Pillow's warning, and beyond its error
    with pytest.raises(ValueError, match=r"large\.png has .*more than 67,108,864 pixels.*scale it down"):
        read_image(tmp_path / "large.png", convert=True)


def test_the_limit_holds_for_frames_in_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for module in (camera_frame, image_file):
        monkeypatch.setattr(module, "MOST_PIXELS", 12)
    frame = np.zeros((3, 5, 3), dtype=np.uint8)
    Image.fromarray(frame).save(tmp_path / "frame.png")
    with pytest.raises(ValueError, match="has 5 x 3 pixels"):
        read_image(tmp_path / "frame.png")
    for image in (frame, Image.fromarray(frame)):
        with pytest.raises(ValueError, match="has 5 x 3 pixels: expected at most 12"):
            rgb_image(image)
    assert rgb_image(np.ascontiguousarray(frame[:, :4])).size == (4, 3)


def test_a_folder_is_its_images_by_name(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "notes.txt"):
        (tmp_path / name).touch()
    assert [(file.image.name, file.instruction) for file in list_images(tmp_path, "go")] == [
        ("a.jpg", "go"),
        ("b.PNG", "go"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no image"):
        list_images(tmp_path / "empty", "go")
