"""Learn then Test: test settings in a fixed order, from the safest to the cheapest, until one fails; no torch.

Shape legend: E episodes.
"""

import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from evla_compile.certificate.p_value import check_episodes, hoeffding_bentkus, share
from evla_compile.certificate.record import Certificate, SettingTest


def certify(
    settings: Sequence[str],
    losses: Iterable[ArrayLike],
    *,
    alpha: float,
    tau: float,
    tau_unit: str,
    delta: float,
    frames: int,
    frames_digest: str,
    split_seed: int,
    certifying_share: float,
) -> Certificate:
    """Test settings in their order at level delta, stop at the first that fails, and certify the one before it.

    Each null hypothesis is "the expected loss of this setting exceeds alpha". Since the order is fixed beforehand and
    no test follows one that failed, the probability that any setting is certified wrongly is at most delta, however
    many there are, however their losses depend on each other, and whatever the order (A. Angelopoulos et al., "Learn
    then Test", 2021, arXiv 2110.01052, fixed sequence testing). None may be certified; the certificate then says so.

    Args:
        settings: names, from the safest to the cheapest; names and order rest on nothing that was seen of the
            certifying episodes.
        losses: for each setting, in that order, its losses [E] in [0, 1]; see `episode_losses`. They are read up to the
            first setting that fails, so a generator measures no more than is needed.
        alpha: bound on the expected loss.
        tau: the largest deviation that is no loss.
        tau_unit: what `tau` measures and its unit, in words.
        delta: probability of a wrong certificate.
        frames: control steps of the certifying episodes.
        frames_digest: digest of their frames, 16 hexadecimal digits; see `evla_compile.calibration.fingerprint`.
        split_seed: seed of the split into choosing and certifying episodes.
        certifying_share: share of the split.

    Raises:
        CalibrationError: the episodes are too few to certify anything; the message says how many are needed.
        ValueError: there are no settings, the losses do not fit them, or another argument is out of its range.
    """
    alpha, delta = share("alpha", alpha), share("delta", delta)
    tested: list[SettingTest] = []
    episodes: int | None = None
    for name, given in zip(settings, losses, strict=True):
        found_E = _losses(name, given, episodes)
        if episodes is None:
            episodes = len(found_E)
            check_episodes(episodes, alpha=alpha, delta=delta)
        mean = math.fsum(found_E) / episodes
        p_value = hoeffding_bentkus(mean, episodes, alpha)
        tested.append(SettingTest(name=name, mean_loss=mean, p_value=p_value, certified=p_value <= delta))
        if p_value > delta:
            break
    if episodes is None:
        raise ValueError("there are no settings to certify: expected at least one")
    return Certificate(
        alpha=alpha,
        tau=tau,
        tau_unit=tau_unit,
        delta=delta,
        episodes=episodes,
        frames=frames,
        tested=tuple(tested),
        not_reached=tuple(settings[len(tested) :]),
        frames_digest=frames_digest,
        split_seed=split_seed,
        certifying_share=certifying_share,
    )


def _losses(name: str, given: ArrayLike, episodes: int | None) -> list[float]:
    """Return a setting's losses [E], checked."""
    found_E = np.asarray(given, dtype=np.float64)
    if found_E.ndim != 1 or not found_E.size or episodes not in (None, len(found_E)):
        wanted = "[E] of at least one episode" if episodes is None else f"[{episodes}], as of the settings before"
        raise ValueError(f"losses of {name!r:.80} have shape {list(found_E.shape)}: expected {wanted}")
    bad = np.flatnonzero(~((found_E >= 0) & (found_E <= 1)))  # NaN is in no range
    if bad.size:
        raise ValueError(f"loss {bad[0]} of {name!r:.80} is {found_E[bad[0]]}: expected a number in [0, 1]")
    return [float(loss) for loss in found_E]
