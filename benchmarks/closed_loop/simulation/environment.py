"""A Meta-World task as CogACT sees it: camera frame in, action [7] out, everything decided by a seed.

Needs the extra `sim`: `make sim`, or `pip install -e '.[sim]'` and Debian packages: docs/how-to/closed-loop.md.
"""

import importlib
import os
import warnings
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from benchmarks.closed_loop.simulation.tasks import SimTask
from evla_compile.errors import EvlaError
from evla_compile.host.processor import GRIPPER
from evla_compile.settings.sizes import ACTION_WIDTH

FRAME_SIDE = 224
"""Side in pixels of a rendered frame; the policy's processor squashes it to what its towers take."""
STEP_METRES = 0.01
"""How far the gripper is sent by an environment action of 1 in one control step."""
STATE_WIDTH = 9
"""Numbers of `SimEnvironment.state`."""
HALF_OPEN = (0.08, 0.12)
"""Range in metres of a half-open window's slide, which travels 0.2 m; success is declared within 0.05 m of its end."""

_CAMERA = "corner2"
_CAMERA_POSITION, _CAMERA_TARGET, _CAMERA_FOVY = (0.85, 0.2, 0.75), (0.0, 0.66, 0.17), 46.0
_NOW, _BEFORE, _GOAL = slice(18), slice(18, 36), slice(36, 39)  # of Meta-World's observation [39]


def simulator_lack() -> str | None:
    """Return why the simulator cannot be imported, with the remedy; None if it can. Call it before any other work."""
    try:
        for name in ("mujoco", "metaworld.env_dict", "metaworld.policies"):
            _simulator_module(name)
    except EvlaError as error:
        return str(error)
    return None


class SimEnvironment:
    """One task in MuJoCo: `reset(seed)`, `frame()`, `step(action)`; use it in a `with` block.

    Actions are [7] in CogACT's order: translation of the gripper in metres, rotation (ignored: Meta-World's gripper
    does not turn), gripper 1 for open and 0 for closed. Two runs with the same seed and the same actions are equal.

    Attributes:
        task: the task.
        success: whether the task was done at any step since the reset.
    """

    def __init__(self, task: SimTask) -> None:
        self.task = task
        self.success = False
        environments = _simulator_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
        self._environment: Any = environments[task.environment]()
        # Draw a goal at every reset instead of a fixed one by `set_task`, and let the expert see it.
        self._environment._freeze_rand_vec = False
        self._environment.seeded_rand_vec = True  # otherwise NumPy's global generator draws it
        self._environment._set_task_called = True
        self._environment._partially_observable = False
        vars(self._environment).pop("sawyer_observation_space", None)
        self._expert: Any = getattr(_simulator_module("metaworld.policies"), task.expert)()
        if task.goal_radius is not None:
            self._environment.model.site("goal").size[:] = task.goal_radius
        self._renderer = _renderer(self._environment.model)
        self._observation: NDArray[np.float64] = np.zeros(39)

    def __enter__(self) -> Self:
        """Return the environment."""
        return self

    def __exit__(self, *_: object) -> None:
        """Release the renderer."""
        self._renderer.close()

    def reset(self, seed: int, *, half_open: bool = False) -> None:
        """Start the episode that the seed decides.

        Args:
            seed: whole number from 0 up.
            half_open: start with the window half open, by an amount that the seed decides too.

        Raises:
            ValueError: `half_open` is asked of a task without a window.
        """
        if half_open and not self.task.half_open:
            raise ValueError(f"half_open=True: {self.task.environment} has no window")
        self._environment.seed(seed)
        self._environment.reset()
        self.success = False
        if half_open:
            slide = np.random.Generator(np.random.PCG64(seed)).uniform(*HALF_OPEN)
            self._environment.data.joint("window_slide").qpos = slide
        # Meta-World's reset draws twice, and moves goals and windows without updating MuJoCo's derived state: until the
        # first step, frame and observation would show the positions of the first draw, which is discarded.
        _simulator_module("mujoco").mj_forward(self._environment.model, self._environment.data)
        self._observation = self._environment._get_obs()
        self._observation[_BEFORE] = self._observation[_NOW]

    def frame(self) -> NDArray[np.uint8]:
        """Return the camera frame, uint8 [224,224,3]."""
        self._renderer.update_scene(self._environment.data, _CAMERA)
        pixels: NDArray[np.uint8] = self._renderer.render()
        return pixels

    def state(self) -> NDArray[np.float64]:
        """Return the positions in metres of gripper, object and goal, [9]."""
        return np.concatenate([self._observation[:3], self._observation[4:7], self._observation[_GOAL]])

    def window_slide(self) -> float:
        """Return how far a window is open, 0 to 0.2 metres.

        Raises:
            KeyError: the task has no window.
        """
        return float(self._environment.data.joint("window_slide").qpos[0])

    def expert_action(self) -> NDArray[np.float64]:
        """Return the scripted expert's action, [7], from the simulator's state instead of a frame."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its steps are longer than 1 and are clipped, as in the environment
            wanted = np.clip(self._expert.get_action(self._observation), -1.0, 1.0)
        action = np.zeros(ACTION_WIDTH)
        action[:3] = STEP_METRES * wanted[:3]
        action[GRIPPER] = float(wanted[3] <= 0.0)
        return action

    def step(self, action: ArrayLike) -> bool:
        """Take one control step and return whether the task is done, now or before.

        Raises:
            ValueError: the action is not [7] finite numbers.
        """
        values = np.asarray(action, dtype=np.float64)
        if values.shape != (ACTION_WIDTH,) or not np.isfinite(values).all():
            raise ValueError(f"action={values.tolist()}: expected {ACTION_WIDTH} finite numbers")
        grip = -1.0 if values[GRIPPER] > 0.5 else 1.0
        command = np.clip([*(values[:3] / STEP_METRES), grip], -1.0, 1.0).astype(np.float32)
        self._observation, _, _, _, info = self._environment.step(command)
        self.success = self.success or bool(info["success"] > 0.0)
        return self.success


def _simulator_module(name: str) -> Any:
    """Return a module of the extra `sim`, imported when it is first needed.

    Raises:
        EvlaError: it cannot be imported.
    """
    os.environ.setdefault("MUJOCO_GL", "egl")  # read by mujoco when it is imported; no screen is needed
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise EvlaError(f"cannot import the simulator ({error}): run `make sim`") from error


def _renderer(model: Any) -> Any:
    """Return a renderer of the camera that shows gripper and object well, without what makes software rendering slow.

    The stock view is far away and upside down; shadows and antialiasing would take 130 ms a frame.
    """
    mujoco = _simulator_module("mujoco")
    camera = mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, _CAMERA)
    backward = np.subtract(_CAMERA_POSITION, _CAMERA_TARGET)
    backward /= np.linalg.norm(backward)
    right = np.cross((0.0, 0.0, 1.0), backward)
    right /= np.linalg.norm(right)
    axes = np.stack([right, np.cross(backward, right), backward], axis=1)
    mujoco.mju_mat2Quat(model.cam_quat[camera], axes.reshape(-1))
    model.cam_pos[camera], model.cam_fovy[camera] = _CAMERA_POSITION, _CAMERA_FOVY
    model.vis.quality.offsamples = 0
    renderer = mujoco.Renderer(model, FRAME_SIDE, FRAME_SIDE)
    for flag in (mujoco.mjtRndFlag.mjRND_SHADOW, mujoco.mjtRndFlag.mjRND_REFLECTION):
        renderer.scene.flags[flag] = 0
    return renderer
