"""Episodes: the split into those that choose and those that certify, and the loss of each."""

import math
from pathlib import Path

import numpy as np
import pytest

from evla_compile.certificate.episodes import EpisodeSplit, episode_losses, split_episodes
from evla_compile.errors import CalibrationError
from evla_compile.host.frames import FrameFile


def frames(instruction: str, *episodes: str | None) -> list[FrameFile]:
    """Return three frames of each episode."""
    return [
        FrameFile(image=Path("0.png"), instruction=instruction, episode=episode) for episode in episodes for _ in "abc"
    ]


def episodes_of(given: list[FrameFile], places: tuple[int, ...]) -> set[str | None]:
    return {given[place].episode for place in places}


GIVEN = [*frames("open", *"abcdefghij"), *frames("close", *"klmn"), *frames("push", *"op"), *frames("pull", "q")]


@pytest.mark.parametrize("seed", range(20))
def test_every_episode_is_in_one_part_and_every_instruction_in_both(seed: int) -> None:
    split = split_episodes(GIVEN, certifying_share=0.5, seed=seed)
    assert sorted(split.choosing + split.certifying) == list(range(len(GIVEN)))
    assert list(split.choosing) == sorted(split.choosing)
    assert list(split.certifying) == sorted(split.certifying)
    certifying = episodes_of(GIVEN, split.certifying)
    assert not certifying & episodes_of(GIVEN, split.choosing)
    assert [len(certifying & set(task)) for task in ("abcdefghij", "klmn", "op", "q")] == [5, 2, 1, 0]
    assert split.warnings == ("'pull': one episode, so the certificate says nothing about this task",)


def test_the_share_is_rounded_and_leaves_an_episode_to_each_part() -> None:
    def count(share: float) -> int:
        return len(split_episodes(frames("open", *"abcde"), certifying_share=share, seed=0).certifying) // 3

    assert [count(share) for share in (0.01, 0.29, 0.3, 0.5, 0.7, 0.99)] == [1, 1, 2, 3, 4, 4]


def test_a_seed_draws_the_same_episodes_in_any_order_of_frames() -> None:
    turned = GIVEN[::-1]
    first, second = (split_episodes(given, certifying_share=0.5, seed=3) for given in (GIVEN, turned))
    assert episodes_of(GIVEN, first.certifying) == episodes_of(turned, second.certifying)
    # fixed for good: a certificate names its seed, so the same frames must be split in the same way for ever
    assert episodes_of(GIVEN, first.certifying) == set("cefijlmo")


def test_every_episode_is_drawn_about_as_often_as_every_other() -> None:
    given = frames("open", *"abcdefghij")
    splits = [split_episodes(given, certifying_share=0.3, seed=seed) for seed in range(1000)]
    drawn = [sum(name in episodes_of(given, split.certifying) for split in splits) for name in "abcdefghij"]
    assert sum(drawn) == 3000
    assert min(drawn) > 240  # of 300 expected, four standard deviations less
    assert max(drawn) < 360


def test_frames_without_an_episode_are_refused() -> None:
    for given in ([*frames("open", "a"), *frames("open", None)], frames("open", None)):
        with pytest.raises(CalibrationError, match=r"frame \d names no episode.*not; give every frame its"):
            split_episodes(given, certifying_share=0.5, seed=0)
    with pytest.raises(CalibrationError, match="frame 1 names no episode"):
        episode_losses([0.0, 0.0], ["a", None], 0.1)
    with pytest.raises(CalibrationError, match="there are no frames"):
        split_episodes([], certifying_share=0.5, seed=0)
    with pytest.raises(CalibrationError, match="there are no frames"):
        episode_losses([], [], 0.1)


def test_an_episode_of_two_instructions_is_refused() -> None:
    with pytest.raises(CalibrationError, match="episode 'a' has frames of 'open' and of 'close'"):
        split_episodes([*frames("open", "a"), *frames("close", "a")], certifying_share=0.5, seed=0)


def test_settings_of_a_split_out_of_range_are_refused() -> None:
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="certifying_share="):
            split_episodes(GIVEN, certifying_share=share, seed=0)
    for seed in (-1, 2**63):
        with pytest.raises(ValueError, match="seed="):
            split_episodes(GIVEN, certifying_share=0.5, seed=seed)


def test_a_name_that_utf8_cannot_encode_is_split_like_any_other() -> None:
    split = split_episodes(frames("open", "\ud800", "b"), certifying_share=0.5, seed=0)
    assert isinstance(split, EpisodeSplit)
    assert len(split.certifying) == 3


def test_a_loss_is_the_fraction_of_an_episodes_steps_beyond_the_threshold() -> None:
    deviations = [0.1, 0.3, 0.2, 0.0, 0.21, 0.9, 0.2]
    losses = episode_losses(deviations, ["b", "a", "b", "c", "b", "a", "c"], 0.2)
    assert losses.tolist() == [1.0, 1 / 3, 0.0]
    assert losses.dtype == np.float64


def test_losses_do_not_depend_on_how_the_frames_are_ordered() -> None:
    random = np.random.default_rng(0)
    deviations, names = random.random(60), [f"episode {place % 7}" for place in range(60)]
    order = random.permutation(60)
    expected = episode_losses(deviations, names, 0.4)
    assert np.array_equal(episode_losses(deviations[order], [names[place] for place in order], 0.4), expected)
    assert expected.shape == (7,)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1])
def test_a_deviation_or_threshold_that_is_none_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="the deviation of frame 1 is"):
        episode_losses([0.0, value], ["a", "a"], 0.1)
    with pytest.raises(ValueError, match="tau="):
        episode_losses([0.0, 0.0], ["a", "a"], value)


def test_each_frame_needs_one_deviation() -> None:
    with pytest.raises(ValueError, match=r"deviations of shape \[3\]: expected \[2\]"):
        episode_losses([0.0, 0.0, 0.0], ["a", "a"], 0.1)
    with pytest.raises(ValueError, match=r"deviations of shape \[2, 1\]: expected \[2\]"):
        episode_losses([[0.0], [0.0]], ["a", "a"], 0.1)
