import pytest

from benchmarks.closed_loop.evaluation.paired_statistics import mcnemar_exact, paired_difference, success_rate


@pytest.mark.parametrize(
    ("successes", "episodes", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17, 857 (1998), table I, method 3
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilsons_interval_has_the_published_values(successes: int, episodes: int, low: float, high: float) -> None:
    rate = success_rate(successes, episodes)
    assert (round(rate.low, 4), round(rate.high, 4)) == (low, high)
    mirrored = success_rate(episodes - successes, episodes)
    assert (round(1 - mirrored.high, 4), round(1 - mirrored.low, 4)) == (low, high)


@pytest.mark.parametrize(("successes", "episodes"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts_are_refused(successes: int, episodes: int) -> None:
    with pytest.raises(ValueError, match=f"{successes} successes in {episodes} episodes"):
        success_rate(successes, episodes)


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    # 2 * binomial tails by hand: 67/1024; 1 of 2^9; one pair tells nothing
    [(9, 2, 67 / 1024), (2, 9, 67 / 1024), (0, 10, 2 / 1024), (0, 1, 1.0), (5, 5, 1.0), (0, 0, 1.0)],
)
def test_mcnemars_p_is_exact(gained: int, lost: int, p_value: float) -> None:
    assert mcnemar_exact(gained, lost) == pytest.approx(p_value, rel=1e-12)


def outcomes(both: int, gained: int, lost: int, neither: int) -> tuple[dict[int, bool], dict[int, bool]]:
    reference = [True] * both + [False] * gained + [True] * lost + [False] * neither
    variant = [True] * both + [True] * gained + [False] * lost + [False] * neither
    return dict(enumerate(reference)), dict(enumerate(variant))


@pytest.mark.parametrize(
    ("table", "low", "high"),
    # R. G. Newcombe, Statistics in Medicine 17, 2635 (1998), table III, method 10
    [((36, 12, 2, 0), 0.0569, 0.3404), ((36, 14, 0, 0), 0.1528, 0.4167)],
)
def test_the_paired_interval_has_the_published_values(
    table: tuple[int, int, int, int], low: float, high: float
) -> None:
    found = paired_difference(*outcomes(*table))
    assert found.difference == pytest.approx((table[1] - table[2]) / 50)
    assert (found.gained, found.lost, found.episodes) == (table[1], table[2], 50)
    assert (round(found.low, 4), round(found.high, 4)) == (low, high)


def test_without_discordant_pairs_the_interval_still_has_a_width() -> None:
    found = paired_difference(*outcomes(90, 0, 0, 10))
    assert found.difference == 0.0
    assert -0.05 < found.low < 0.0 < found.high < 0.05


def test_only_shared_episodes_are_compared() -> None:
    found = paired_difference({1: True, 2: True, 3: False}, {2: False, 3: False, 4: True})
    assert (found.episodes, found.lost, found.gained) == (2, 1, 0)
    with pytest.raises(ValueError, match="share no episode"):
        paired_difference({1: True}, {2: True})


def test_swapping_the_two_mirrors_the_interval() -> None:
    one, other = (paired_difference(*pair) for pair in (outcomes(3, 30, 20, 7), outcomes(3, 20, 30, 7)))
    assert (one.difference, one.low, one.high) == pytest.approx((-other.difference, -other.high, -other.low))
