"""How far a policy's actions are from another's at equal noise, beside how far noise alone moves them; no torch.

A robot executes the first H actions of a chunk, which are relative movements: they add up to where its hand ends. In
closed loop the policy sees where that was and corrects itself, unless it is off in the same way again and again. So the
headline is the drift: of each instruction, the mean over all its calls of the vector between where the two policies
end. Of all figures that were tried it ranks compiled policies best by the success they lose (docs/results/quality.md).

Shape legend: R draws of noise, F frames, A actions of a chunk, H actions of it that are executed, W action dimensions.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evla_compile.arguments import whole_number
from evla_compile.errors import CalibrationError
from evla_compile.fidelity.chunks import ActionChunks
from evla_compile.host.frames import Frame
from evla_compile.host.processor import GRIPPER, ActionStatistics, scale_actions

HORIZON = 8
"""Actions of a chunk that count by default: as many as are executed between two calls in the closed loop of the
benchmarks."""
DIMENSIONS = ("x", "y", "z", "roll", "pitch", "yaw", "gripper")
"""Names of the action dimensions, in their order."""

_MILLIMETRES, _DEGREES = 1000.0, 180.0 / np.pi
_UNITS = (*[("mm", _MILLIMETRES)] * 3, *[("degrees", _DEGREES)] * 3, ("flips", 1.0))


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """A distance over all calls, that is, over all draws of all frames."""

    mean: float
    """Mean over the calls."""
    p95: float
    """95th percentile over the calls."""
    worst: float
    """The largest mean over the draws of one frame."""
    frame: int
    """Place of that frame."""
    own: float
    """The same distance between two noises of the dense policy: root mean square over pairs of draws and frames."""

    @classmethod
    def of(cls, distances: NDArray[np.float64], own: NDArray[np.float64]) -> "Deviation":
        """Summarise distances [R,F], and those of the dense policy between pairs of its draws [N,F]."""
        by_frame = distances.mean(axis=0)
        frame = int(by_frame.argmax())
        return cls(
            mean=float(distances.mean()),
            p95=float(np.percentile(distances, 95)),
            worst=float(by_frame[frame]),
            frame=frame,
            own=_root_mean_square(own),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DimensionDeviation:
    """Deviation of one action dimension, action by action."""

    name: str
    """Its name."""
    unit: str
    """Unit of the figures."""
    mean: float
    """Mean absolute difference over calls and actions."""
    p95: float
    """95th percentile of it."""
    own: float
    """Root mean square of the difference between two noises of the dense policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InstructionDeviation:
    """Deviation on the frames of one instruction."""

    instruction: str
    """The instruction."""
    frames: int
    """Its frames."""
    drift: float
    """Length of the mean, over its calls, of the vector between where the two policies end, mm."""
    own: float
    """The same between two noises of the dense policy, mean over pairs of draws: what so few frames leave of chance."""
    beyond_noise: float
    """Share of its calls that end farther off than `Fidelity.end.own`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeDeviation:
    """Deviation on the frames of one episode."""

    episode: str
    """Its name."""
    frames: int
    """Its frames."""
    beyond_noise: float
    """Share of its calls that end farther off than `Fidelity.end.own`."""
    mean: float
    """Mean of `Fidelity.end`'s distance on them, mm."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Fidelity:
    """How far a policy's actions are from the dense policy's, on recorded frames and from equal noise."""

    drift: float
    """The headline: the largest drift of any instruction, mm."""
    beyond_noise: float
    """Share of the calls whose executed actions end farther from where the dense policy's end than `end.own`."""
    frames: int
    """Frames compared."""
    draws: int
    """Noises of each."""
    horizon: int
    """Actions of a chunk that count, H."""
    end: Deviation
    """Distance between where the translations of the executed actions add up to, mm."""
    step: Deviation
    """Distance between two translations, mean over the executed actions, mm."""
    rotation: Deviation
    """Distance between what the rotations (roll, pitch, yaw) of the executed actions add up to, degrees."""
    gripper_flips: float
    """Share of the executed actions whose gripper command differs."""
    own_gripper_flips: float
    """The same between two noises of the dense policy."""
    dimensions: tuple[DimensionDeviation, ...]
    """Every action dimension."""
    instructions: tuple[InstructionDeviation, ...]
    """Every instruction, the one that drifts farthest first."""
    episodes: tuple[EpisodeDeviation, ...]
    """Every episode, the farthest first; empty where the frames name none."""

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON-ready values."""
        return asdict(self)

    def line(self) -> str:
        """Return the headline as a sentence."""
        worst = self.instructions[0]
        return (
            f"fidelity: at {worst.instruction!r:.60} the hand drifts {self.drift:.1f} mm in {self.horizon} actions"
            f" (chance: {worst.own:.1f} mm), the most of {len(self.instructions)} instructions;"
            f" {self.beyond_noise:.1%} of {self.frames * self.draws} calls end farther off than the policy's own noise"
            f" moves them ({self.end.own:.1f} mm)"
        )

    @staticmethod
    def how_to_read() -> str:
        """Return the sentence that tells what the headline means."""
        return (
            "how to read it: drift is what the dense policy's actions and these differ by on average, which feedback"
            " does not take back; variants of the demo policy with less than 4 mm lost 6 points of success at most,"
            " those with more than 6 mm lost 3 or more"
        )


def compare_chunks(
    dense: ActionChunks,
    found: ActionChunks,
    statistics: ActionStatistics,
    frames: Sequence[Frame],
    *,
    horizon: int = HORIZON,
) -> Fidelity:
    """Compare action chunks with those of the dense policy.

    Actions are what a robot gets: clipped, the gripper decided, in the units of a dataset, translations in metres and
    rotations in radians, as CogACT's datasets have them.

    Args:
        dense: those of the dense policy, from two noises at least.
        found: those of the policy to judge, on the same frames; it may have fewer draws.
        statistics: the dataset's, which scale the actions.
        frames: the frames, for their instructions and episodes.
        horizon: actions of a chunk that count.

    Raises:
        CalibrationError: the two are of different frames, or the dense chunks are of one noise alone.
        ValueError: a chunk has fewer actions than the horizon, or `frames` are others in number.
    """
    _check_pair(dense, found)
    draws, count, chunk = found.samples.shape[:3]
    horizon = whole_number("horizon", horizon, low=1, high=chunk)
    if len(frames) != count:
        raise ValueError(f"{len(frames)} frames are given for chunks on {count}: expected those that were run")
    right = scale_actions(dense.samples[:, :, :horizon], statistics)  # [R,F,H,W]
    left = scale_actions(found.samples[:, :, :horizon], statistics)
    apart = left - right[:draws]
    own = np.stack([right[a] - right[b] for a, b in combinations(range(len(right)), 2)])  # [N,F,H,W]
    end = Deviation.of(_ends(apart), _ends(own))
    beyond = _ends(apart) > end.own  # [R,F]
    instructions = _by_instruction(frames, beyond, _displacements(apart), _displacements(own))
    return Fidelity(
        drift=instructions[0].drift,
        beyond_noise=float(beyond.mean()),
        frames=count,
        draws=draws,
        horizon=horizon,
        end=end,
        step=Deviation.of(_steps(apart), _steps(own)),
        rotation=Deviation.of(_turns(apart), _turns(own)),
        gripper_flips=float((apart[..., GRIPPER] != 0).mean()),
        own_gripper_flips=float((own[..., GRIPPER] != 0).mean()),
        dimensions=tuple(
            DimensionDeviation(
                name=name,
                unit=unit,
                mean=float(np.abs(factor * apart[..., place]).mean()),
                p95=float(np.percentile(np.abs(factor * apart[..., place]), 95)),
                own=_root_mean_square(factor * own[..., place]),
            )
            for place, (name, (unit, factor)) in enumerate(zip(DIMENSIONS, _UNITS, strict=True))
        ),
        instructions=instructions,
        episodes=_by_episode(frames, beyond, _ends(apart)),
    )


def _check_pair(dense: ActionChunks, found: ActionChunks) -> None:
    if dense.frames != found.frames or dense.samples.shape[1:] != found.samples.shape[1:]:
        raise CalibrationError(
            f"the dense policy's chunks are of {dense.samples.shape[1]} frames with digest {dense.frames[:12]}, those"
            f" to judge of {found.samples.shape[1]} with digest {found.frames[:12]}: run both on the same frames, with"
            " the same tokenizer"
        )
    if len(dense.samples) < 2:
        raise CalibrationError("the dense policy's chunks are of one noise: record two draws or more (--draws 2)")
    if len(found.samples) > len(dense.samples):
        raise CalibrationError(
            f"{len(found.samples)} draws to judge, but the dense policy's chunks have {len(dense.samples)}: give"
            f" --draws {len(dense.samples)} or fewer"
        )


def _displacements(apart: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the vector between where the translations [...,F,H,W] end, mm, [...,F,3]."""
    found: NDArray[np.float64] = _MILLIMETRES * apart[..., :3].sum(axis=-2)
    return found


def _ends(apart: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far apart the translations [...,F,H,W] end, mm, [...,F]."""
    found: NDArray[np.float64] = np.linalg.norm(_displacements(apart), axis=-1)
    return found


def _steps(apart: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far apart the translations [...,F,H,W] are, mean over the actions, mm, [...,F]."""
    found: NDArray[np.float64] = _MILLIMETRES * np.linalg.norm(apart[..., :3], axis=-1).mean(axis=-1)
    return found


def _turns(apart: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return how far apart the rotations [...,F,H,W] end, degrees, [...,F]; small ones add up."""
    found: NDArray[np.float64] = _DEGREES * np.linalg.norm(apart[..., 3:GRIPPER].sum(axis=-2), axis=-1)
    return found


def _by_instruction(
    frames: Sequence[Frame], beyond: NDArray[np.bool_], apart: NDArray[np.float64], own: NDArray[np.float64]
) -> tuple[InstructionDeviation, ...]:
    """Summarise displacements [R,F,3], and those between pairs of draws of the dense policy [N,F,3]."""
    places: dict[str, list[int]] = {}
    for place, frame in enumerate(frames):
        places.setdefault(frame.instruction, []).append(place)
    found = [
        InstructionDeviation(
            instruction=instruction,
            frames=len(held),
            drift=float(np.linalg.norm(apart[:, held].mean(axis=(0, 1)))),
            own=float(np.linalg.norm(own[:, held].mean(axis=1), axis=-1).mean()),
            beyond_noise=float(beyond[:, held].mean()),
        )
        for instruction, held in places.items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.drift, each.instruction)))


def _by_episode(
    frames: Sequence[Frame], beyond: NDArray[np.bool_], ends: NDArray[np.float64]
) -> tuple[EpisodeDeviation, ...]:
    places: dict[str, list[int]] = {}
    for place, frame in enumerate(frames):
        if frame.episode is not None:
            places.setdefault(frame.episode, []).append(place)
    found = [
        EpisodeDeviation(
            episode=episode,
            frames=len(held),
            beyond_noise=float(beyond[:, held].mean()),
            mean=float(ends[:, held].mean()),
        )
        for episode, held in places.items()
    ]
    return tuple(sorted(found, key=lambda each: (-each.beyond_noise, -each.mean, each.episode)))


def _root_mean_square(values: NDArray[np.float64]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))
