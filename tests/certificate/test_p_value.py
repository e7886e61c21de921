"""The p-values of Hoeffding and Bentkus, against sums of exact fractions and by simulation."""

import math
from collections.abc import Callable
from fractions import Fraction
from typing import TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.certificate.p_value import LEAST_SHARE, check_episodes, episodes_needed, hoeffding_bentkus
from evla_compile.errors import CalibrationError

DRAWS = 2000
EPISODES = 60
ALPHA = 0.1

Losses: TypeAlias = Callable[[np.random.Generator], NDArray[np.float64]]


def lower_tail(successes: int, trials: int, chance: Fraction) -> Fraction:
    """Return P(Binomial(trials, chance) <= successes), exact."""
    return sum(
        (
            math.comb(trials, count) * chance**count * (1 - chance) ** (trials - count)
            for count in range(min(successes, trials) + 1)
        ),
        Fraction(0),
    )


def by_hand(total: Fraction, episodes: int, alpha: Fraction) -> float:
    """Return the p-value as the papers write it, for an exact sum of losses."""
    mean = min(total / episodes, alpha)
    log = math.log
    divergence = float(mean) * log(mean / alpha) if mean else 0.0
    divergence += float(1 - mean) * log((1 - mean) / (1 - alpha))
    bentkus = math.e * float(lower_tail(math.ceil(total), episodes, alpha))
    return min(math.exp(-episodes * divergence), bentkus, 1.0)


@pytest.mark.parametrize("alpha", [Fraction(1, 100), Fraction(1, 10), Fraction(1, 3), Fraction(9, 10)])
@pytest.mark.parametrize("episodes", [1, 2, 7, 49, 120])
def test_p_values_are_those_of_the_formula(alpha: Fraction, episodes: int) -> None:
    for total in [Fraction(step, 3) for step in range(3 * episodes + 1)]:
        expected = by_hand(total, episodes, alpha)
        found = hoeffding_bentkus(float(total / episodes), episodes, float(alpha))
        assert found == pytest.approx(expected, rel=1e-10, abs=1e-300), (total, episodes)


def test_a_whole_sum_of_losses_that_rounding_has_raised_counts_as_it() -> None:
    raised = [(k, n) for n in range(1, 200) for k in range(n) if math.ceil(n * (k / n)) > k]
    assert raised
    for k, n in raised:
        expected = by_hand(Fraction(k), n, Fraction(9, 10))
        assert hoeffding_bentkus(k / n, n, 0.9) == pytest.approx(expected, rel=1e-9), (k, n)


def test_the_ends_are_exact() -> None:
    assert hoeffding_bentkus(0.0, 3, 0.5) == 0.125
    assert hoeffding_bentkus(1.0, 10, 0.5) == 1.0
    assert hoeffding_bentkus(0.5, 10, 0.5) == 1.0
    assert hoeffding_bentkus(0.0, 1, LEAST_SHARE) == 1 - LEAST_SHARE
    assert hoeffding_bentkus(1e-3, 1_000_000, 0.5) == 0.0
    assert 0 < hoeffding_bentkus(0.0999, 1_000_000, 0.1) < 1


def test_p_values_rise_with_the_mean_loss() -> None:
    for episodes in (5, 33, 200):
        found = [hoeffding_bentkus(step / 1000, episodes, 0.2) for step in range(1001)]
        assert found == sorted(found)
        assert found[0] < found[100] < found[-1] == 1.0


@pytest.mark.parametrize("total", [0, 1, 2.5, 7])
def test_p_values_fall_with_every_episode_without_loss(total: float) -> None:
    found = [hoeffding_bentkus(total / episodes, episodes, 0.2) for episodes in range(40, 400)]
    assert found == sorted(found, reverse=True)
    assert found[-1] < found[0]


def test_p_values_fall_with_more_episodes_of_the_same_mean() -> None:
    found = [hoeffding_bentkus(0.1, episodes, 0.2) for episodes in range(10, 400, 10)]  # whole sums of losses
    assert found == sorted(found, reverse=True)


def bernoulli(random: np.random.Generator) -> NDArray[np.float64]:
    return (random.random((DRAWS, EPISODES)) < ALPHA).astype(np.float64)


def beta(random: np.random.Generator) -> NDArray[np.float64]:
    return random.beta(0.5, 4.5, (DRAWS, EPISODES))


def two_points(random: np.random.Generator) -> NDArray[np.float64]:
    """Return losses 0.05 and 0.55, the second one in a tenth of the episodes."""
    return np.where(random.random((DRAWS, EPISODES)) < 0.1, 0.55, 0.05)


def two_instructions(random: np.random.Generator) -> NDArray[np.float64]:
    """Return losses of half the episodes with chance 0.02, of the others with 0.18: not one distribution."""
    chances_E = np.where(np.arange(EPISODES) < EPISODES // 2, 0.02, 0.18)
    return (random.random((DRAWS, EPISODES)) < chances_E).astype(np.float64)


def most_expected(draws: int, chance: float) -> int:
    """Return what a Binomial(draws, chance) exceeds with a probability below 0.001."""
    counts = np.arange(draws + 1)
    factorials = np.array([math.lgamma(count + 1) for count in counts])
    logs = factorials[-1] - factorials - factorials[::-1] + counts * np.log(chance) + counts[::-1] * np.log1p(-chance)
    return int(np.searchsorted(np.cumsum(np.exp(logs)), 0.999))


@pytest.mark.parametrize("losses", [bernoulli, beta, two_points, two_instructions])
def test_p_values_of_a_mean_at_the_bound_are_small_no_more_often_than_they_say(losses: Losses) -> None:
    drawn = losses(np.random.default_rng(11))
    assert drawn.mean() == pytest.approx(ALPHA, rel=0.05)
    found = np.array([hoeffding_bentkus(float(mean), EPISODES, ALPHA) for mean in drawn.mean(axis=1)])
    for level in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        assert np.count_nonzero(found <= level) <= most_expected(DRAWS, level), level


@pytest.mark.parametrize("alpha", [LEAST_SHARE, 0.01, 0.05, 0.1, 0.25, 0.5, 0.9])
@pytest.mark.parametrize("delta", [LEAST_SHARE, 0.01, 0.05, 0.1, 0.125, 0.9])
def test_with_one_episode_fewer_than_needed_nothing_is_certified(alpha: float, delta: float) -> None:
    needed = episodes_needed(alpha, delta)
    assert hoeffding_bentkus(0.0, needed, alpha) <= delta
    assert needed == 1 or hoeffding_bentkus(0.0, needed - 1, alpha) > delta


def test_the_episodes_needed_are_those_of_the_formula() -> None:
    assert episodes_needed(0.1, 0.1) == 22  # 0.9^21 = 0.109, 0.9^22 = 0.098
    assert episodes_needed(0.05, 0.05) == 59
    assert episodes_needed(0.5, 0.125) == 3


@pytest.mark.parametrize(("alpha", "table"), [(0.1, [29, 42, 70, 173]), (0.05, [59, 87, 144, 375])])
def test_so_many_episodes_certify_as_the_documentation_says(alpha: float, table: list[int]) -> None:
    for part, expected in zip((0, 0.1, 0.25, 0.5), table, strict=True):
        failing = [n for n in range(1, 1000) if hoeffding_bentkus(alpha * part, n, alpha) > 0.05]
        assert failing[-1] == expected - 1


def test_too_few_episodes_are_refused_with_the_number_that_is_needed() -> None:
    check_episodes(22, alpha=0.1, delta=0.1)
    with pytest.raises(CalibrationError, match="found 21 certifying episodes, at least 22 are needed for alpha"):
        check_episodes(21, alpha=0.1, delta=0.1)


@pytest.mark.parametrize("value", [0.0, 1.0, -0.1, math.nan, math.inf, 1e-7, True, "0.1", None])
def test_a_share_that_no_bound_can_have_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match=r"alpha=.*expected a number in \[1e-06, 1\)"):
        hoeffding_bentkus(0.0, 10, value)
    with pytest.raises(ValueError, match="delta="):
        episodes_needed(0.1, value)


def test_other_arguments_out_of_range_are_refused() -> None:
    for mean in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="mean_loss="):
            hoeffding_bentkus(mean, 10, 0.1)
    with pytest.raises(ValueError, match="episodes=0"):
        hoeffding_bentkus(0.0, 0, 0.1)
