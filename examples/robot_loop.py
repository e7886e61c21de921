"""The control loop of a robot: an artifact, a camera, CogACT's adaptive ensemble; imports no torch.

    python examples/robot_loop.py ARTIFACT --image frame.png --instruction "open the door" --steps 20

The camera here shows one picture again and again, and `execute` prints; put your own in their places.
"""

import argparse
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

import evla_compile as evla
from evla_compile.host.simpler import AdaptiveEnsembler


def camera(path: str, steps: int) -> Iterator[Image.Image]:
    """Yield what the robot sees, 8-bit RGB of any size."""
    with Image.open(path) as image:
        frame = image.convert("RGB")
    for _ in range(steps):
        yield frame


def execute(action: NDArray[np.float64]) -> None:
    """Send one action [7] to the robot: translation, rotation, gripper (1 is open)."""
    print("  ".join(f"{value:+.4f}" for value in action))


def main() -> None:
    """Run the loop."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("artifact", help="folder or .onnx that evla compile wrote, or a Hugging Face id")
    parser.add_argument("--image", required=True)
    parser.add_argument("--instruction", required=True)
    parser.add_argument("--unnorm-key", help="dataset whose statistics scale the actions, where there are several")
    parser.add_argument("--steps", type=int, default=20)
    given = parser.parse_args()

    with evla.runtime.load(given.artifact) as robot:
        ensembler = AdaptiveEnsembler(horizon=2)
        for step, image in enumerate(camera(given.image, given.steps)):
            # Noise is an input: another seed in each step is what upstream does; the same one repeats a call exactly.
            chunk = robot.predict_action(image, given.instruction, unnorm_key=given.unnorm_key, seed=step)
            execute(ensembler.add(chunk))
        print(robot.latency.summary())


if __name__ == "__main__":
    main()
