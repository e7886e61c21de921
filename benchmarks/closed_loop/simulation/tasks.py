"""The Meta-World tasks of the closed loop: environments, experts and instructions; plain data, imports no simulator."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

MAX_STEPS = 150
"""Control steps after which an evaluated episode counts as failed; the experts need 30 to 120."""

EVALUATION_SEEDS = 5000
"""First seed of evaluated episodes."""
CALIBRATION_SEED = EVALUATION_SEEDS - 100
"""First seed of the calibration frames; demonstrations use the seeds below."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SimTask:
    """One task."""

    environment: str
    """Meta-World's name of the environment."""
    expert: str
    """Class of the scripted expert in `metaworld.policies`."""
    instructions: tuple[str, ...]
    """Instructions for the policy: the first is used for evaluation, training draws from all."""
    goal_radius: float | None = None
    """Radius in metres with which the goal is drawn; None for Meta-World's own. It changes the rendering only."""
    half_open: bool = False
    """Whether demonstrations also start from a half-open window, where only the instruction shows the task."""

    @property
    def instruction(self) -> str:
        """The instruction under which the task is evaluated."""
        return self.instructions[0]


TASKS: Mapping[str, SimTask] = MappingProxyType(
    {
        "reach": SimTask(
            environment="reach-v3",
            expert="SawyerReachV3Policy",
            goal_radius=0.04,  # the stock one, of 0.02, is five pixels wide in a frame of 112: too small to show depth
            instructions=(
                "reach the red ball",
                "move the gripper to the red ball",
                "touch the red ball",
                "go to the red ball",
            ),
        ),
        "button-press-topdown": SimTask(
            environment="button-press-topdown-v3",
            expert="SawyerButtonPressTopdownV3Policy",
            instructions=(
                "press the button from above",
                "push the red button down",
                "press down the red button",
                "hit the button on the box",
            ),
        ),
        "door-open": SimTask(
            environment="door-open-v3",
            expert="SawyerDoorOpenV3Policy",
            instructions=(
                "open the door",
                "pull the door open",
                "open the door of the safe",
                "pull the door by its handle",
            ),
        ),
        "window-open": SimTask(
            environment="window-open-v3",
            expert="SawyerWindowOpenV3Policy",
            instructions=(
                "open the window",
                "slide the window open",
                "push the window open",
                "open the sliding window",
            ),
            half_open=True,
        ),
        "window-close": SimTask(
            environment="window-close-v3",
            expert="SawyerWindowCloseV3Policy",
            instructions=(
                "close the window",
                "slide the window shut",
                "push the window closed",
                "close the sliding window",
            ),
            half_open=True,
        ),
    }
)
"""The tasks by name."""
