"""P-values of "the expected loss exceeds alpha" by the inequalities of Hoeffding and Bentkus; no torch.

Sources: S. Bates, A. Angelopoulos, L. Lei, J. Malik and M. Jordan, "Distribution-Free, Risk-Controlling Prediction
Sets", 2021 (arXiv 2101.02703), and A. Angelopoulos, S. Bates, E. Candes, M. Jordan and L. Lei, "Learn then Test", 2021
(arXiv 2110.01052), which gives both as one p-value.
"""

import math

from evla_compile.arguments import is_real, number, whole_number
from evla_compile.errors import CalibrationError

LEAST_SHARE = 1e-6
"""Least share of a bound or a split: an alpha of this needs more than two million episodes at a delta of 0.1."""

_ROUNDING = 1e-9
"""Sums of losses that exceed a whole number by less count as it. Bentkus' bound interpolates between whole sums, so
this lowers a p-value by a relative 1e-8 or so, where rounding up would raise it by the probability of a whole loss."""

_NEGLIGIBLE = 2.0**-60


def share(name: str, value: object) -> float:
    """Return a share that a bound or a split can be stated with, as a float.

    Args:
        name: the argument's name, for the message.
        value: what was given.

    Raises:
        ValueError: it is no number from `LEAST_SHARE` up and below 1.
    """
    if is_real(value) and LEAST_SHARE <= value < 1:
        return float(value)
    raise ValueError(f"{name}={value!r:.40}: expected a number in [{LEAST_SHARE:g}, 1)")


def hoeffding_bentkus(mean_loss: float, episodes: int, alpha: float) -> float:
    """Return the p-value of "the expected loss is alpha or more": the smaller, the better the evidence against it.

    p = min(exp(-n h(min(r, alpha), alpha)), e P(Binomial(n, alpha) <= ceil(n r))), with h(a, b) = a log(a / b) +
    (1 - a) log((1 - a) / (1 - b)), for losses in [0, 1] of independent episodes, r their mean and n their number. If
    the expected loss is alpha or more, P(p <= u) <= u for every u. The losses need not have one distribution: where
    they differ, the average of their expectations is meant.

    Args:
        mean_loss: mean of the losses, 0 to 1.
        episodes: how many they are; never the number of frames, which depend on each other within an episode.
        alpha: the bound, `LEAST_SHARE` to 1, without 1.

    Raises:
        ValueError: an argument is out of its range.
    """
    mean = number("mean_loss", mean_loss, low=0, high=1)
    n = whole_number("episodes", episodes, low=1)
    alpha = share("alpha", alpha)
    if mean >= alpha:
        return 1.0
    if mean == 0:
        return float((1 - alpha) ** n)  # Hoeffding's, which is the smaller one by a factor of e
    divergence = mean * math.log(mean / alpha) + (1 - mean) * (math.log1p(-mean) - math.log1p(-alpha))
    hoeffding = math.exp(-n * max(0.0, divergence))
    worst = math.ceil(n * mean - _ROUNDING)
    # A binomial's median is at most ceil(n alpha): from there on its tail is 1/2 or more, and Bentkus' bound above 1.
    bentkus = math.e * _lower_tail(worst, n, alpha) if worst < n * alpha else 1.0
    return min(hoeffding, bentkus)


def episodes_needed(alpha: float, delta: float) -> int:
    """Return the fewest episodes with which a setting can be certified: one whose loss is zero in all of them.

    Args:
        alpha: bound on the expected loss, `LEAST_SHARE` to 1, without 1.
        delta: probability of a wrong certificate, in the same range.

    Raises:
        ValueError: an argument is out of its range.
    """
    alpha, delta = share("alpha", alpha), share("delta", delta)
    # (1 - alpha)^n <= delta, solved for n; the loop settles the rounding by the very p-value that decides.
    needed = max(1, math.floor(math.log(delta) / math.log1p(-alpha)) - 1)
    while hoeffding_bentkus(0.0, needed, alpha) > delta:
        needed += 1
    return needed


def check_episodes(episodes: int, *, alpha: float, delta: float) -> None:
    """Refuse a number of certifying episodes with which nothing can be certified.

    Args:
        episodes: the certifying episodes.
        alpha: bound on the expected loss.
        delta: probability of a wrong certificate.

    Raises:
        CalibrationError: they are too few; the message says how many are needed.
        ValueError: alpha or delta is out of its range.
    """
    needed = episodes_needed(alpha, delta)
    if episodes < needed:
        raise CalibrationError(
            f"found {episodes} certifying episodes, at least {needed} are needed for alpha={alpha}, delta={delta}, even"
            " if no control step deviates: give frames of more episodes, or allow a larger alpha or delta"
        )


def _lower_tail(successes: int, trials: int, chance: float) -> float:
    """Return P(Binomial(trials, chance) <= successes), for successes below trials * chance.

    There the terms fall from the last one down, so they are summed from it until they no longer count.
    """
    log_last = (
        math.lgamma(trials + 1)
        - math.lgamma(successes + 1)
        - math.lgamma(trials - successes + 1)
        + successes * math.log(chance)
        + (trials - successes) * math.log1p(-chance)
    )
    total = term = 1.0  # in units of the last term
    odds = (1 - chance) / chance
    for count in range(successes, 0, -1):
        term *= count / (trials - count + 1) * odds
        total += term
        if term < total * _NEGLIGIBLE:
            break
    return math.exp(log_last) * total
