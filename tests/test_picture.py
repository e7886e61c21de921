import numpy as np
import pytest

from evla_compile.picture import draw_kept_tokens, kept_tokens_text

WHITE = np.full((30, 40, 3), 200, dtype=np.uint8)


def test_dropped_patches_are_dark_and_kept_ones_framed() -> None:
    picture = np.asarray(draw_kept_tokens(WHITE, np.array([0, 5]), 9, side=31))
    assert picture.shape == (30, 30, 3)
    centres = picture[5::10, 5::10, 0]
    assert centres.tolist() == [[200, 50, 50], [50, 50, 200], [50, 50, 50]]
    assert picture[0, 0].tolist() == picture[19, 29].tolist() == [255, 200, 0]
    assert picture[29, 0].tolist() == [50, 50, 50]


def test_the_text_shows_the_same() -> None:
    assert kept_tokens_text(np.array([0, 5]), 9) == "##....\n....##\n......"


@pytest.mark.parametrize(("kept", "patches"), [([0], 8), ([0], 0), ([9], 9), ([-1], 9)])
def test_what_is_no_grid_is_refused(kept: list[int], patches: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        kept_tokens_text(np.array(kept), patches)
