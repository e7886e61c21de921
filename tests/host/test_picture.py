import numpy as np
import pytest

from evla_compile.host.picture import draw_kept_tokens, kept_tokens_text

WHITE = np.full((30, 40, 3), 200, dtype=np.uint8)


def test_dropped_patches_are_dark_and_kept_ones_framed() -> None:
    picture = np.asarray(draw_kept_tokens(WHITE, np.array([0, 5]), 9, side=31))
    assert picture.shape == (30, 30, 3)
    centres = picture[5::10, 5::10, 0]
    assert centres.tolist() == [[200, 50, 50], [50, 50, 200], [50, 50, 50]]
    assert picture[0, 0].tolist() == picture[19, 29].tolist() == [255, 200, 0]
    assert picture[29, 0].tolist() == [50, 60, 100]


def test_dropped_patches_keep_no_colour_of_the_camera() -> None:
    red = np.full((30, 30, 3), (240, 0, 0), dtype=np.uint8)
    picture = np.asarray(draw_kept_tokens(red, np.array([0]), 9, side=30))
    assert picture[5, 5].tolist() == [240, 0, 0]
    assert picture[5, 15].tolist() == [20, 30, 70]


def test_the_legend_stands_below_the_frame_and_takes_nothing_from_it() -> None:
    plain = np.asarray(draw_kept_tokens(WHITE, np.array([0, 5]), 9, side=300))
    pictures = {
        (text, count): np.asarray(draw_kept_tokens(WHITE, np.arange(count), 9, instruction=text, side=300))
        for text in ("open", "shut", "open " * 90)
        for count in (2, 3)
    }
    legends = {key: picture[300:] for key, picture in pictures.items()}
    assert np.array_equal(
        np.asarray(draw_kept_tokens(WHITE, np.array([0, 5]), 9, instruction="go", side=300))[:300], plain
    )
    first = legends["open", 2]
    assert first.shape == legends["shut", 2].shape == (2 * 8 + 3 * 22, 300, 3)
    assert not np.array_equal(first, legends["shut", 2])  # the instruction is written
    assert not np.array_equal(first, legends["open", 3])  # and the count
    assert legends["open " * 90, 2].shape[0] == 2 * 8 + 5 * 22  # three lines of it at most
    assert {(255, 200, 0), (32, 42, 82)} <= {tuple(pixel) for pixel in first.reshape(-1, 3).tolist()}  # the swatches


def test_the_text_shows_the_same() -> None:
    assert kept_tokens_text(np.array([0, 5]), 9) == "##....\n....##\n......"


@pytest.mark.parametrize(("kept", "patches"), [([0], 8), ([0], 0), ([9], 9), ([-1], 9)])
def test_what_is_no_grid_is_refused(kept: list[int], patches: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        kept_tokens_text(np.array(kept), patches)
