"""Episodes: their split into those that choose and those that certify, and the loss of each; no torch.

Shape legend: F frames, E episodes.
"""

import hashlib
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evla_compile.arguments import is_real, whole_number
from evla_compile.certificate.p_value import share
from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame, FrameFile

LARGEST_SEED = 2**63 - 1
"""Largest seed of a split."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeSplit:
    """Two parts of the frames, by their places; no episode has frames in both."""

    choosing: tuple[int, ...]
    """Frames that may calibrate, compare and order settings, ascending."""
    certifying: tuple[int, ...]
    """Frames that nothing but the certificate may see, ascending."""
    warnings: tuple[str, ...]
    """Instructions that the certificate says nothing about, since they have a single episode."""


def split_episodes(frames: Sequence[Frame | FrameFile], *, certifying_share: float, seed: int) -> EpisodeSplit:
    """Split frames at random by episode, of every instruction alike.

    Of each instruction's episodes the share is certifying, rounded, but each part has at least one; a single episode is
    for choosing. The order is that of SHA-256 digests of the seed and the names, so that it is the same everywhere and
    does not depend on the order of the frames.

    Args:
        frames: all frames; each names its episode, and no two episodes have one name.
        certifying_share: share of the episodes that certify, `LEAST_SHARE` to 1, without 1.
        seed: seed of the split, 0 to `LARGEST_SEED`.

    Raises:
        CalibrationError: there are no frames, a frame names no episode, or an episode has several instructions.
        ValueError: the share or the seed is out of its range.
    """
    part = share("certifying_share", certifying_share)
    seed = whole_number("seed", seed, low=0, high=LARGEST_SEED)
    names = named_episodes([frame.episode for frame in frames])
    certifying: set[str] = set()
    warnings = []
    for instruction, episodes in _by_instruction(frames, names).items():
        if len(episodes) == 1:
            warnings.append(f"{instruction!r}: one episode, so the certificate says nothing about this task")
            continue
        count = min(max(1, math.floor(part * len(episodes) + 0.5)), len(episodes) - 1)
        drawn = sorted((_draw(seed, instruction, name), name) for name in episodes)
        certifying.update(name for _, name in drawn[:count])
    return EpisodeSplit(
        choosing=tuple(place for place, name in enumerate(names) if name not in certifying),
        certifying=tuple(place for place, name in enumerate(names) if name in certifying),
        warnings=tuple(warnings),
    )


def episode_losses(deviations: ArrayLike, episodes: Sequence[str | None], tau: float) -> NDArray[np.float64]:
    """Return the loss of every episode: the fraction of its control steps whose deviation exceeds `tau`.

    Args:
        deviations: one of every frame [F], from 0 up, in the unit of `tau`.
        episodes: the episode of every frame [F], in any order.
        tau: the largest deviation that is no loss, from 0 up.

    Returns:
        Losses [E], 0 to 1, in the ascending order of the episodes' names.

    Raises:
        CalibrationError: there are no frames, or a frame names no episode.
        ValueError: a deviation or `tau` is negative or not finite, or there is not one deviation for each frame.
    """
    tau = threshold(tau)
    found_F = np.asarray(deviations, dtype=np.float64)
    names = named_episodes(episodes)
    if found_F.shape != (len(names),):
        raise ValueError(f"deviations of shape {list(found_F.shape)}: expected [{len(names)}], one of each frame")
    bad = np.flatnonzero(~(np.isfinite(found_F) & (found_F >= 0)))
    if bad.size:
        raise ValueError(f"the deviation of frame {bad[0]} is {found_F[bad[0]]}: expected a finite number from 0 up")
    _, places_F, steps_E = np.unique(names, return_inverse=True, return_counts=True)
    return np.bincount(places_F, weights=found_F > tau) / steps_E


def named_episodes(episodes: Sequence[str | None]) -> list[str]:
    """Return the episodes of frames, all named.

    Raises:
        CalibrationError: there are none, or a frame names no episode.
    """
    if not episodes:
        raise CalibrationError("there are no frames: a certificate needs frames of recorded episodes")
    named = [name for name in episodes if name is not None]
    if len(named) < len(episodes):
        raise CalibrationError(
            f"frame {list(episodes).index(None)} names no episode: a certificate counts episodes, which are drawn"
            ' independently, and blocks of consecutive frames are not; give every frame its "episode" in frames.jsonl,'
            " or as Frame(image, instruction, episode)"
        )
    return named


def threshold(tau: object) -> float:
    """Return a largest deviation that is no loss, as a float.

    Raises:
        ValueError: it is negative, not finite, or no number.
    """
    if is_real(tau) and 0 <= tau <= sys.float_info.max:
        return float(tau)
    raise ValueError(f"tau={tau!r:.40}: expected a finite number from 0 up")


def _by_instruction(frames: Sequence[Frame | FrameFile], names: Sequence[str]) -> dict[str, list[str]]:
    """Return the episodes of every instruction, both in the order of their first frames."""
    instructions: dict[str, str] = {}
    for frame, name in zip(frames, names, strict=True):
        first = instructions.setdefault(name, frame.instruction)
        if first != frame.instruction:
            raise CalibrationError(
                f"episode {name!r:.80} has frames of {first!r:.80} and of {frame.instruction!r:.80}: give each episode"
                " a name of its own, such as 'task/0', and one instruction"
            )
    found: dict[str, list[str]] = {}
    for name, instruction in instructions.items():
        found.setdefault(instruction, []).append(name)
    return found


def _draw(seed: int, instruction: str, episode: str) -> bytes:
    """Return an episode's place in the random order of a seed."""
    return hashlib.sha256(
        f"{seed}\n{len(instruction)}\n{instruction}\n{episode}".encode(errors="surrogatepass")
    ).digest()
