"""The trained policy that the package contains, and its frames.

It has CogACT's architecture at 15 M parameters, and solves tasks of Meta-World in simulation; its model card is
`data/demo_policy/README.md`.
"""

from pathlib import Path

from evla_compile.host.frames import Frame, read_frames

DEMO_POLICY = Path(__file__).parents[1] / "data" / "demo_policy"
"""Its run directory, for `load`."""


DEMO_IMAGE = DEMO_POLICY / "demo" / "door-open.png"
"""The picture of `demo_frame`, for the command line."""


def calibration_frames() -> list[Frame]:
    """Return the frames to calibrate it on: 40 of each of its tasks, from 20 episodes of experts each."""
    return read_frames(DEMO_POLICY / "calibration")


def demo_frame() -> Frame:
    """Return the observation that `evla demo` shows, from an episode that is used for nothing else."""
    (frame,) = read_frames(DEMO_POLICY / "demo")
    return frame
