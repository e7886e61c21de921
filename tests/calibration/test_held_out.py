"""How calibration frames are split into those that are fitted on and those that decide."""

import pytest
from PIL import Image

from evla_compile.calibration.held_out import BLOCK, split_frames
from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame

IMAGE = Image.new("RGB", (4, 4))


def frames(instruction: str, *episodes: str | None) -> list[Frame]:
    """Return three frames of each episode."""
    return [Frame(IMAGE, instruction, episode) for episode in episodes for _ in range(3)]


def test_every_fifth_episode_of_each_instruction_is_held_out() -> None:
    given = [*frames("open", *"abcdefghij"), *frames("close", *"klm")]
    split = split_frames(given, 9)
    assert {given[place].episode for place in split.held_out} == {"e", "j", "m"}
    assert split.fitted | split.held_out == set(range(39))
    assert not split.fitted & split.held_out
    assert split.warnings == ()


def test_an_episode_is_never_divided_however_its_frames_are_ordered() -> None:
    given = frames("open", *"abcde")[::2] + frames("open", *"abcde")[1::2]
    split = split_frames(given, 2)
    assert {given[place].episode for place in split.held_out} == {"e"}
    assert "e" not in {given[place].episode for place in split.fitted}


def test_without_episodes_blocks_of_consecutive_frames_are_held_out() -> None:
    given = [Frame(IMAGE, "open")] * (5 * BLOCK) + [Frame(IMAGE, "close")] * (2 * BLOCK)
    split = split_frames(given, 2)
    assert sorted(split.held_out) == [*range(4 * BLOCK, 5 * BLOCK), *range(6 * BLOCK, 7 * BLOCK)]


def test_too_few_frames_are_refused_with_the_number_that_is_needed() -> None:
    given = [*frames("open", *"abc"), *frames("close", *"def")]
    split_frames(given, 9)
    with pytest.raises(
        CalibrationError, match=r"about 10 calibration frames for each .*, 20 in all, .* and these are 18"
    ):
        split_frames(given, 10)


def test_frames_of_one_episode_are_refused() -> None:
    with pytest.raises(CalibrationError, match="of one episode for each instruction"):
        split_frames(frames("open", "a", "a"), 2)


def test_instructions_with_few_frames_are_named() -> None:
    given = [*frames("open", *"abcdefgh"), *frames("close", "i"), *frames("push", "j", "j", "j", "j")]
    few, alone = split_frames(given, 10).warnings
    assert few.startswith("'close': 3 frames, fewer than 10")
    assert alone.startswith("'push': one episode")
