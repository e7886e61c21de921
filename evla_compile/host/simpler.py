"""The SIMPLER protocol around a CogACT policy: ensembling of action chunks, and each robot's command; no torch.

One policy call per control step: `chunk -> AdaptiveEnsembler.add -> postprocessor -> RobotCommand.array -> env.step`.
A new instruction resets the ensembler and the postprocessor.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from evla_compile.arguments import number, whole_number
from evla_compile.host.processor import GRIPPER
from evla_compile.settings.sizes import ACTION_WIDTH


@dataclass(frozen=True, kw_only=True, slots=True)
class SimplerRobot:
    """How CogACT is run on one of SIMPLER's robots."""

    unnorm_key: str
    """Dataset whose statistics scale the actions."""
    horizon: int
    """Action chunks that the ensembler looks back on, the newest included."""
    sticky_repeat: int
    """Control steps for which a gripper command is repeated; 1 where it is absolute and need not be."""


WIDOWX = SimplerRobot(unnorm_key="bridge_orig", horizon=7, sticky_repeat=1)
"""SIMPLER's `widowx_bridge`."""
GOOGLE_ROBOT = SimplerRobot(unnorm_key="fractal20220817_data", horizon=2, sticky_repeat=10)
"""SIMPLER's `google_robot`."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RobotCommand:
    """What one control step sends to SIMPLER's environment."""

    world_vector: NDArray[np.float64]
    """Translation of the end effector, [3], metres."""
    rot_axangle: NDArray[np.float64]
    """Rotation of the end effector, [3]: unit axis times angle in radians."""
    gripper: float
    """Gripper command in the robot's own convention."""

    @property
    def array(self) -> NDArray[np.float64]:
        """The command as the environment takes it, [7]: translation, rotation, gripper."""
        return np.array([*self.world_vector, *self.rot_axangle, self.gripper])


class AdaptiveEnsembler:
    """Averages what the last chunks predict for the present step, weighted by their agreement with the newest chunk.

    With p_j the prediction of the chunk from j steps ago, the weight of p_j is proportional to
    exp(alpha * cos(p_j, p_0)), where cos is the cosine similarity (CogACT, arXiv 2411.19650).
    """

    def __init__(self, horizon: int, alpha: float = 0.1) -> None:
        """Start with no chunks.

        Args:
            horizon: chunks to look back on, the newest included.
            alpha: how much agreement counts; 0 gives the plain mean.

        Raises:
            ValueError: `horizon` is no whole number from 1 up, or `alpha` is no number from -100 to 100.
        """
        self.horizon = whole_number("horizon", horizon, low=1)
        self.alpha = number("alpha", alpha, low=-100.0, high=100.0)
        self._chunks: deque[NDArray[np.float64]] = deque(maxlen=self.horizon)

    def add(self, chunk: ArrayLike) -> NDArray[np.float64]:
        """Add the newest chunk [A,7] of actions, A at least the horizon, and return the action [7] of this step.

        Raises:
            ValueError: the chunk has another shape, a number that is not finite, or numbers so large that their
                average is not.
        """
        newest = np.array(chunk, dtype=np.float64)
        if newest.ndim != 2 or newest.shape[0] < self.horizon or newest.shape[1] != ACTION_WIDTH:
            raise ValueError(
                f"the chunk has the shape {newest.shape}: expected [A,{ACTION_WIDTH}] with A of at least"
                f" horizon={self.horizon}"
            )
        _check_finite(newest)
        self._chunks.appendleft(newest)
        predictions = np.stack([past[age] for age, past in enumerate(self._chunks)])
        with np.errstate(over="ignore", invalid="ignore"):  # what overflows is refused next
            norms = np.linalg.norm(predictions, axis=1)
            cosines = predictions @ predictions[0] / (norms * norms[0] + 1e-7)
            weights = np.exp(self.alpha * cosines)
            average: NDArray[np.float64] = weights @ predictions / weights.sum()
        _check_finite(average)
        return average

    def reset(self) -> None:
        """Forget every chunk: a new task begins."""
        self._chunks.clear()


class WidowXPostprocessor:
    """Turns actions into commands of the WidowX arm, whose gripper takes +1 for open and -1 for closed."""

    def __call__(self, action: ArrayLike) -> RobotCommand:
        """Return the command for an action [7]: metres, radians (roll, pitch, yaw), gripper opening.

        Raises:
            ValueError: the action has another shape or a number that is not finite.
        """
        values = _checked(action)
        return _command(values, 1.0 if values[GRIPPER] > 0.5 else -1.0)

    def reset(self) -> None:
        """Do nothing: this robot's commands do not depend on earlier ones."""


class GoogleRobotPostprocessor:
    """Turns actions into commands of the Google robot, whose gripper takes changes: positive closes, negative opens.

    A change of more than 0.5 is latched and repeated for `GOOGLE_ROBOT.sticky_repeat` steps. Changes are measured from
    the opening at the last latched change, as in CogACT and unlike SIMPLER's own policies: so slow changes add up to a
    command.
    """

    def __init__(self) -> None:
        """Start a task."""
        self.reset()

    def __call__(self, action: ArrayLike) -> RobotCommand:
        """Return the command for an action [7]: metres, radians (roll, pitch, yaw), gripper opening.

        Raises:
            ValueError: the action has another shape or a number that is not finite.
        """
        values = _checked(action)
        return _command(values, self._gripper_change(float(values[GRIPPER])))

    def reset(self) -> None:
        """Forget the gripper's opening and any latched change: a new task begins."""
        self._reference: float | None = None
        self._latched = 0.0
        self._repeats_left = 0

    def _gripper_change(self, opening: float) -> float:
        if self._reference is None:
            self._reference = opening
        if self._repeats_left == 0:
            change = self._reference - opening
            if abs(change) <= 0.5:
                return change
            self._reference, self._latched = opening, change
            self._repeats_left = GOOGLE_ROBOT.sticky_repeat
        self._repeats_left -= 1
        return self._latched


def axis_angle(roll: float, pitch: float, yaw: float) -> NDArray[np.float64]:
    """Return the rotation about the fixed x, then y, then z axis as unit axis times angle, [3], all in radians.

    The angle is in [0, 2 pi]; no rotation gives zeros.
    """
    cr, sr = math.cos(roll / 2), math.sin(roll / 2)
    cp, sp = math.cos(pitch / 2), math.sin(pitch / 2)
    cy, sy = math.cos(yaw / 2), math.sin(yaw / 2)
    real = cr * cp * cy + sr * sp * sy
    imaginary = np.array(
        [
            sr * cp * cy - cr * sp * sy,
            cr * sp * cy + sr * cp * sy,
            cr * cp * sy - sr * sp * cy,
        ]
    )
    sine = float(np.linalg.norm(imaginary))
    if sine == 0.0:
        return np.zeros(3)
    # atan2 and not acos: the latter loses half the digits of a small angle, and a step's rotation is small.
    return imaginary * (2.0 * math.atan2(sine, real) / sine)


def _command(values: NDArray[np.float64], gripper: float) -> RobotCommand:
    roll, pitch, yaw = values[3:6].tolist()
    return RobotCommand(world_vector=values[:3], rot_axangle=axis_angle(roll, pitch, yaw), gripper=gripper)


def _checked(action: ArrayLike) -> NDArray[np.float64]:
    values = np.array(action, dtype=np.float64)
    if values.shape != (ACTION_WIDTH,):
        raise ValueError(f"the action has the shape {values.shape}: expected [{ACTION_WIDTH}], one step of a chunk")
    _check_finite(values)
    return values


def _check_finite(values: NDArray[np.float64]) -> None:
    if not np.isfinite(values).all():
        raise ValueError(f"actions must be finite, a robot must not move on others: found {values.tolist()}")
