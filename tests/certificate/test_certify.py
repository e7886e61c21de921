"""Fixed-sequence testing: what is certified, and by simulation how often wrongly."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from evla_compile.certificate.certify import certify
from evla_compile.certificate.episodes import episode_losses, split_episodes
from evla_compile.certificate.record import Certificate
from evla_compile.errors import CalibrationError
from evla_compile.host.frames import FrameFile

DRAWS = 2000
EPISODES = 80
STEPS = 40
"""Control steps of an episode."""
ALPHA = DELTA = 0.1

Draw: TypeAlias = Callable[[np.random.Generator, NDArray[np.float64]], NDArray[np.float64]]
"""Losses [C,E] of an expected loss for each of C settings."""


def certified(losses: ArrayLike, *, frames: int = EPISODES * STEPS) -> Certificate:
    """Return the certificate of settings "0", "1" and so on, from their losses [C,E]."""
    given = list(np.asarray(losses))
    return certify(
        [str(place) for place in range(len(given))],
        given,
        alpha=ALPHA,
        tau=0.05,
        tau_unit="of the gripper's range",
        delta=DELTA,
        frames=frames,
        frames_digest="0123456789abcdef",
        split_seed=0,
        certifying_share=0.5,
    )


def whole(random: np.random.Generator, risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return losses of 0 or 1, independent between settings: all steps of an episode deviate, or none."""
    return (random.random((len(risks), EPISODES)) < risks[:, None]).astype(np.float64)


def shared(random: np.random.Generator, risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return losses of 0 or 1 that rise together: an episode that is hard for one setting is hard for all."""
    return (random.random(EPISODES) < risks[:, None]).astype(np.float64)


def opposed(random: np.random.Generator, risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return losses of 0 or 1 of which every other setting's are hard episodes for its neighbours easy."""
    hardness = random.random(EPISODES)
    turned = np.arange(len(risks))[:, None] % 2 == 1
    return (np.where(turned, 1 - hardness, hardness) < risks[:, None]).astype(np.float64)


def steps(random: np.random.Generator, risks: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return fractions of steps, from a chance that differs between episodes and is shared between settings."""
    hardness = random.random(EPISODES) < 0.25
    chances = np.minimum(risks[:, None] * np.where(hardness, 3.7, 0.1), 1)  # 0.25 * 3.7 + 0.75 * 0.1 = 1
    return random.binomial(STEPS, chances) / STEPS


RISKS = {
    "rising": np.linspace(0.01, 0.2, 12),
    "all at the bound": np.full(20, ALPHA),
    "just above the bound behind safe ones": np.array([0.005, 0.01, 0.02, *[ALPHA * 1.01] * 20]),
    "rising and falling": np.array([0.02, 0.11, 0.01, 0.12, 0.01, 0.15, 0.03, 0.11]),
}


@pytest.mark.parametrize("draw", [whole, shared, opposed, steps])
@pytest.mark.parametrize("risks", RISKS.values(), ids=RISKS)
def test_a_wrong_setting_is_certified_in_less_than_a_fraction_delta_of_draws(
    risks: NDArray[np.float64], draw: Draw
) -> None:
    random = np.random.default_rng(7)
    wrong = 0
    for _ in range(DRAWS):
        certificate = certified(draw(random, risks))
        wrong += any(test.certified and risks[int(test.name)] >= ALPHA for test in certificate.tested)
    assert wrong <= DRAWS * DELTA


def test_from_frames_to_certificate_a_wrong_one_is_as_rare() -> None:
    """Two instructions of different difficulty; the settings have the expected losses 0.04, 0.1 and 0.1."""
    names = [(task, f"{task}/{place}") for task in ("open", "close") for place in range(80)]
    listed = [FrameFile(image=Path("0.png"), instruction=task, episode=name) for task, name in names for _ in range(5)]
    random = np.random.default_rng(5)
    draws, wrong, found = 300, 0, 0
    for seed in range(draws):
        places = list(split_episodes(listed, certifying_share=0.5, seed=seed).certifying)
        episodes = [listed[place].episode for place in places]
        losses = []
        for easy, hard in ((0.0, 0.08), (0.02, 0.18), (0.1, 0.1)):
            chances = np.repeat([easy, hard], 80)
            deviations = np.repeat(np.where(random.random(160) < chances, 0.5, 0.01), 5)  # alike in an episode
            losses.append(episode_losses(deviations[places], episodes, 0.05))
        certificate = certified(losses, frames=len(places))
        assert (certificate.episodes, certificate.frames) == (80, 400)
        wrong += certificate.certified in ("1", "2")
        found += certificate.certified is not None
    assert found > draws / 4
    assert wrong <= draws * DELTA


def test_a_safe_setting_is_certified_with_enough_episodes() -> None:
    random = np.random.default_rng(3)
    safe = np.array([0.01, 0.02])
    found = [certified(draw(random, safe)).certified for draw in (whole, shared, steps) for _ in range(300)]
    assert found.count("1") > 0.9 * len(found)


def test_settings_are_tested_in_order_up_to_the_first_that_fails() -> None:
    def failing(count: int) -> NDArray[np.float64]:
        return np.repeat([1.0, 0.0], [count, EPISODES - count])

    certificate = certified([failing(0), failing(2), failing(9), failing(0), failing(1)])
    assert [test.name for test in certificate.tested] == ["0", "1", "2"]
    assert [test.certified for test in certificate.tested] == [True, True, False]
    assert [test.mean_loss for test in certificate.tested] == [0, 2 / EPISODES, 9 / EPISODES]
    assert certificate.not_reached == ("3", "4")
    assert certificate.certified == "1"


def test_all_or_none_may_be_certified() -> None:
    everything = certified(np.zeros((3, EPISODES)))
    assert (everything.certified, everything.not_reached) == ("2", ())
    nothing = certified(np.ones((3, EPISODES)))
    assert (nothing.certified, nothing.not_reached) == (None, ("1", "2"))
    assert len(nothing.tested) == 1


def test_the_count_of_frames_makes_nothing_more_certain() -> None:
    losses = np.full((1, EPISODES), 0.05)
    few, many = (certified(losses, frames=frames) for frames in (EPISODES, EPISODES * 1000))
    assert few.tested == many.tested
    assert few.certified is None


def test_losses_are_read_no_further_than_the_first_setting_that_fails() -> None:
    measured = []

    def measuring() -> Iterator[NDArray[np.float64]]:
        for name, loss in (("0", 0.0), ("1", 0.9), ("2", 0.0)):
            measured.append(name)
            yield np.full(EPISODES, loss)

    given = {"tau": 0.05, "tau_unit": "m", "frames": 800, "frames_digest": "0" * 16}
    certify(["0", "1", "2"], measuring(), alpha=ALPHA, delta=DELTA, split_seed=0, certifying_share=0.5, **given)  # type: ignore[arg-type]
    assert measured == ["0", "1"]


def test_too_few_episodes_are_refused_with_the_number_that_is_needed() -> None:
    assert certified(np.zeros((1, 22))).certified == "0"
    with pytest.raises(CalibrationError, match="found 21 certifying episodes, at least 22 are needed"):
        certified(np.zeros((1, 21)))


def test_losses_that_are_none_are_refused() -> None:
    for bad in (-0.1, 1.1, float("nan")):
        losses = np.zeros((2, EPISODES))
        losses[1, 5] = bad
        with pytest.raises(ValueError, match="loss 5 of '1' is"):
            certified(losses)
    with pytest.raises(ValueError, match="there are no settings"):
        certified([])
    with pytest.raises(ValueError, match=r"shape \[2, 80\]: expected \[E\]"):
        certified(np.zeros((1, 2, EPISODES)))
    with pytest.raises(ValueError, match=r"shape \[0\]: expected \[E\]"):
        certified(np.zeros((1, 0)))
