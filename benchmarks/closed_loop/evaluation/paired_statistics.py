"""Success rates and their comparison: Wilson's and Newcombe's intervals, McNemar's test, Spearman's correlation."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import TypeVar

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Z = NormalDist().inv_cdf(0.975)  # 95 %, two-sided
_Episode = TypeVar("_Episode")


@dataclass(frozen=True, kw_only=True, slots=True)
class Rate:
    """A success rate with Wilson's 95 % interval."""

    successes: int
    """Episodes that succeeded."""
    episodes: int
    """All episodes."""
    low: float
    """Lower end of the interval, 0 to 1."""
    high: float
    """Upper end of the interval, 0 to 1."""

    @property
    def value(self) -> float:
        """The rate, 0 to 1."""
        return self.successes / self.episodes


@dataclass(frozen=True, kw_only=True, slots=True)
class PairedDifference:
    """How one variant's success differs from another's on the same episodes."""

    difference: float
    """Rate of the variant minus rate of the reference, -1 to 1."""
    low: float
    """Lower end of the 95 % interval."""
    high: float
    """Upper end of the 95 % interval."""
    gained: int
    """Episodes that only the variant solved."""
    lost: int
    """Episodes that only the reference solved."""
    episodes: int
    """Episodes that both ran."""
    p_value: float
    """McNemar's exact two-sided p."""


def success_rate(successes: int, episodes: int) -> Rate:
    """Return the rate with Wilson's score interval (E. B. Wilson, JASA 22, 1927).

    Raises:
        ValueError: there are no episodes, or more successes than episodes.
    """
    if not 0 <= successes <= episodes or episodes < 1:
        raise ValueError(f"{successes} successes in {episodes} episodes: expected 0 to n of at least 1")
    rate = successes / episodes
    center = (rate + _Z**2 / (2 * episodes)) / (1 + _Z**2 / episodes)
    half = _Z / (1 + _Z**2 / episodes) * math.sqrt(rate * (1 - rate) / episodes + _Z**2 / (4 * episodes**2))
    # exactly 0 and 1 where the formula gives them but for rounding
    low = 0.0 if successes == 0 else center - half
    high = 1.0 if successes == episodes else center + half
    return Rate(successes=successes, episodes=episodes, low=low, high=high)


def mcnemar_exact(gained: int, lost: int) -> float:
    """Return the exact two-sided p of McNemar's test: the discordant pairs against a fair coin."""
    pairs = gained + lost
    tail = sum(math.comb(pairs, k) for k in range(min(gained, lost) + 1)) / float(2**pairs)
    return min(1.0, 2.0 * tail)


def paired_difference(reference: Mapping[_Episode, bool], variant: Mapping[_Episode, bool]) -> PairedDifference:
    """Compare two variants on the episodes that both ran.

    The interval is Newcombe's for paired proportions (R. G. Newcombe, Statistics in Medicine 17, 1998, method 10): it
    is built from the two Wilson intervals and the correlation of the pairs, and stays sensible without discordant
    pairs, where the plain one has width zero.

    Args:
        reference: whether each episode succeeded with the reference.
        variant: the same with the variant.

    Raises:
        ValueError: they share no episode.
    """
    shared = [episode for episode in reference if episode in variant]
    if not shared:
        raise ValueError("the two variants share no episode, and rates of other episodes are not compared")
    both = sum(reference[episode] and variant[episode] for episode in shared)
    gained = sum(variant[episode] and not reference[episode] for episode in shared)
    lost = sum(reference[episode] and not variant[episode] for episode in shared)
    low, high = _newcombe(both, gained, lost, len(shared) - both - gained - lost)
    return PairedDifference(
        difference=(gained - lost) / len(shared),
        low=low,
        high=high,
        gained=gained,
        lost=lost,
        episodes=len(shared),
        p_value=mcnemar_exact(gained, lost),
    )


def _newcombe(both: int, gained: int, lost: int, neither: int) -> tuple[float, float]:
    """Return the 95 % interval of (gained - lost) / n."""
    count = both + gained + lost + neither
    first, second = success_rate(both + gained, count), success_rate(both + lost, count)
    margins = (both + gained) * (lost + neither) * (both + lost) * (gained + neither)
    product = float(both * neither - gained * lost)
    if product > 0:
        product = max(product - count / 2, 0.0)  # continuity correction
    correlation = product / math.sqrt(margins) if margins else 0.0
    difference = first.value - second.value
    below = _side(first.value - first.low, second.high - second.value, correlation)
    above = _side(first.high - first.value, second.value - second.low, correlation)
    return difference - below, difference + above


def _side(first: float, second: float, correlation: float) -> float:
    return math.sqrt(max(0.0, first**2 - 2 * correlation * first * second + second**2))


def rank_correlation(left: ArrayLike, right: ArrayLike) -> float:
    """Return Spearman's rank correlation of two sequences [N], ties at the mean of their ranks; NaN if one is constant.

    Raises:
        ValueError: their lengths differ, or are below 2.
    """
    a, b = (np.asarray(each, dtype=np.float64) for each in (left, right))
    if a.shape != b.shape or a.ndim != 1 or len(a) < 2:
        raise ValueError(f"sequences of {a.shape} and {b.shape}: expected two of the same length, 2 at least")
    ranks = [_ranks(each) - (len(each) - 1) / 2 for each in (a, b)]
    spread = np.sqrt(np.sum(ranks[0] ** 2) * np.sum(ranks[1] ** 2))
    return float(np.sum(ranks[0] * ranks[1]) / spread) if spread else math.nan


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the place of each value among all, from 0, the mean place among equals."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    found: NDArray[np.float64] = (ends - (counts + 1) / 2)[inverse]
    return found
