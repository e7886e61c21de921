"""Camera frames: which side is up, and what the policy sees of them."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from evla_compile.host.camera_frame import fit, rgb_image, upright
from evla_compile.host.frames import read_frames
from evla_compile.host.image_file import read_image
from evla_compile.host.picture import draw_kept_tokens

Pixels = NDArray[np.uint8]
ORIENTATION = 0x0112
TURNS: dict[int, Callable[[Pixels], Pixels]] = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, -1)[:, ::-1][::-1][:, ::-1],
    8: np.rot90,
}
"""What EXIF's orientations ask for, in numpy; 7 mirrors along the other diagonal."""
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "TIFF": "tiff"}


def stored_pixels() -> Pixels:
    """A frame of which no two orientations are alike, smooth enough to survive JPEG."""
    rows, columns = np.mgrid[0:48, 0:64]
    return np.stack([rows * 5, columns * 3, np.where(rows < columns, 40, 200)], axis=-1).astype(np.uint8)


def save(path: Path, orientation: int | None) -> Pixels:
    """Write the frame with an orientation in its EXIF data, and return the pixels that are stored."""
    image = Image.fromarray(stored_pixels())
    exif = Image.Exif()
    if orientation is not None:
        exif[ORIENTATION] = orientation
    settings: dict[str, Any] = {"lossless": True} if path.suffix == ".webp" else {}
    image.save(path, exif=exif, **settings)
    image.save(path.with_stem("plain"), **settings)
    with Image.open(path.with_stem("plain")) as plain:
        return np.array(plain)


@pytest.mark.parametrize("suffix", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("orientation", TURNS)
def test_an_orientation_is_applied_once_on_every_way_in(tmp_path: Path, orientation: int, suffix: str) -> None:
    path = tmp_path / f"frame.{suffix}"
    expected = TURNS[orientation](save(path, orientation))
    (tmp_path / "frames.jsonl").write_text(json.dumps({"image": path.name, "instruction": "go"}), encoding="utf-8")

    read = read_image(path)
    np.testing.assert_array_equal(np.asarray(read), expected)
    np.testing.assert_array_equal(np.asarray(rgb_image(read)), expected)
    np.testing.assert_array_equal(np.asarray(read_frames(tmp_path)[0].image), expected)
    with Image.open(path) as lazy:
        np.testing.assert_array_equal(np.asarray(rgb_image(lazy)), expected)
    with Image.open(path) as loaded:
        loaded.load()
        np.testing.assert_array_equal(np.asarray(rgb_image(loaded)), expected)
        np.testing.assert_array_equal(np.asarray(rgb_image(loaded.copy())), expected)
        np.testing.assert_array_equal(np.asarray(rgb_image(loaded.convert("RGB"))), expected)
        np.testing.assert_array_equal(fit(loaded, 14), fit(np.ascontiguousarray(expected), 14))


def test_a_mirror_along_the_other_diagonal_swaps_its_corners() -> None:
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    assert TURNS[7](stored).tolist() == [[5, 2], [4, 1], [3, 0]]
    assert TURNS[6](stored).tolist() == [[3, 0], [4, 1], [5, 2]]


@pytest.mark.parametrize("suffix", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("orientation", [None, 0, 9, 255])
def test_without_an_orientation_a_frame_stays_as_it_is(tmp_path: Path, orientation: int | None, suffix: str) -> None:
    path = tmp_path / f"frame.{suffix}"
    expected = save(path, orientation)
    np.testing.assert_array_equal(np.asarray(read_image(path)), expected)


def test_an_orientation_in_xmp_alone_is_applied(tmp_path: Path) -> None:
    Image.fromarray(stored_pixels()).save(tmp_path / "frame.jpg", xmp=b'<x tiff:Orientation="8"/>')
    Image.fromarray(stored_pixels()).save(tmp_path / "plain.jpg")
    with Image.open(tmp_path / "plain.jpg") as plain:
        expected = TURNS[8](np.array(plain))
    read = read_image(tmp_path / "frame.jpg")
    np.testing.assert_array_equal(np.asarray(read), expected)
    np.testing.assert_array_equal(np.asarray(rgb_image(read)), expected)


def test_an_image_without_a_note_is_not_copied() -> None:
    image = Image.fromarray(stored_pixels())
    assert upright(image) is image


@pytest.mark.parametrize("damage", [b"Exif\0\0garbage!", b"Exif\0\0MM\0*\0\0"])
def test_damaged_exif_data_is_refused(tmp_path: Path, damage: bytes) -> None:
    Image.fromarray(stored_pixels()).save(tmp_path / "frame.jpg", exif=damage)
    with pytest.raises(ValueError, match=r"frame.jpg: the image's EXIF data cannot be read .*remove or rewrite it"):
        read_image(tmp_path / "frame.jpg")
    with Image.open(tmp_path / "frame.jpg") as image, pytest.raises(ValueError, match="which side is up is unknown"):
        rgb_image(image)


def test_kept_tokens_are_drawn_on_the_upright_frame(tmp_path: Path) -> None:
    expected = np.ascontiguousarray(TURNS[6](save(tmp_path / "frame.png", 6)))
    kept = np.array([0, 5])
    with Image.open(tmp_path / "frame.png") as image:
        drawn = draw_kept_tokens(image, kept, 9, side=30)
    np.testing.assert_array_equal(np.asarray(drawn), np.asarray(draw_kept_tokens(expected, kept, 9, side=30)))


def deployed_by_hand(image: Image.Image, side: int) -> Pixels:
    """CogACT's `resize_image` and `scale_and_resize`, for a frame that is wider than high, step by step."""
    width, height = image.size
    left = (width - height) // 2
    image = image.crop((left, 0, left + height, height))
    image = image.resize((side, side), resample=Image.Resampling.LANCZOS)
    inner = int(side * math.sqrt(0.9))
    margin = int((side - inner) * 0.5)
    image = image.crop((margin, margin, margin + inner, margin + inner))
    image = image.resize((side, side), resample=Image.Resampling.LANCZOS)
    return np.asarray(image.resize((side, side), resample=Image.Resampling.BICUBIC))


@pytest.mark.parametrize("side", [224, 56, 14])
def test_deploy_framing_is_that_of_the_upstream_server(frame: Image.Image, side: int) -> None:
    expected = deployed_by_hand(frame, side)
    found = fit(frame, side, "deploy")
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(fit(np.asarray(frame), side, "deploy"), expected)
    assert np.abs(found.astype(int) - fit(frame, side)).mean() > 1.0


def test_deploy_framing_of_an_odd_margin_rounds_as_upstream(frame: Image.Image) -> None:
    odd = frame.resize((301, 200))
    np.testing.assert_array_equal(fit(odd, 30, "deploy"), deployed_by_hand(odd, 30))


def test_deploy_framing_cuts_a_high_frame_as_it_cuts_a_wide_one(frame: Image.Image) -> None:
    turned = frame.transpose(Image.Transpose.TRANSPOSE)
    expected = fit(frame, 56, "deploy").swapaxes(0, 1)
    # Not equal: the two directions are resized one after the other, each rounded.
    assert np.abs(fit(turned, 56, "deploy").astype(int) - expected).max() <= 4


def test_deploy_framing_sees_only_the_middle() -> None:
    pixels = np.zeros((100, 200, 3), np.uint8)
    pixels[:, 50:150] = 255
    assert (fit(pixels, 56, "deploy") == 255).all()
    assert (fit(pixels, 56) == 0).any()


def test_deploy_framing_turns_a_frame_before_it_cuts(tmp_path: Path) -> None:
    expected = np.ascontiguousarray(TURNS[6](save(tmp_path / "frame.png", 6)))
    with Image.open(tmp_path / "frame.png") as image:
        np.testing.assert_array_equal(fit(image, 28, "deploy"), fit(expected, 28, "deploy"))


@pytest.mark.parametrize("framing", ["crop", "", None, True, ["deploy"]])
def test_an_unknown_framing_is_refused(frame: Image.Image, framing: Any) -> None:
    with pytest.raises(ValueError, match=r"framing=.*: expected one of whole, deploy"):
        fit(frame, 14, framing)


def test_a_cut_file_that_is_read_late_is_refused(tmp_path: Path) -> None:
    """A PIL image opens by its header; its pixels are read when they are needed."""
    noise = np.random.Generator(np.random.PCG64(0)).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    stored = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(stored[: len(stored) // 2])
    with Image.open(tmp_path / "cut.jpg") as image, pytest.raises(ValueError, match="pixels cannot be read"):
        rgb_image(image)
