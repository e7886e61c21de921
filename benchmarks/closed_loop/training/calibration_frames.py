"""Render frames for calibration, and one for the demo.

    python -m benchmarks.closed_loop.training.calibration_frames RUN

They come from experts' episodes of seeds that neither training nor evaluation uses.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from benchmarks.closed_loop.simulation.environment import SimEnvironment, simulator_lack
from benchmarks.closed_loop.simulation.tasks import CALIBRATION_SEED, EVALUATION_SEEDS, TASKS

CALIBRATION_STEPS = (0, 16, 32)
"""Control step at which each of a task's frames is taken, each in another episode."""
DEMO_TASK, DEMO_SEED, DEMO_STEP = "door-open", EVALUATION_SEEDS - 1, 12
"""Task, seed and step of the demo's frame."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the frames and their list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="RUN", type=Path, help="where to: RUN/calibration and RUN/demo")
    folder = parser.parse_args(arguments).folder
    if lack := simulator_lack():
        parser.error(lack)
    _write(
        folder / "calibration",
        [
            (f"{name}-{index}", name, CALIBRATION_SEED + index, step)
            for name in TASKS
            for index, step in enumerate(CALIBRATION_STEPS)
        ],
    )
    _write(folder / "demo", [(DEMO_TASK, DEMO_TASK, DEMO_SEED, DEMO_STEP)])


def _write(folder: Path, observations: Sequence[tuple[str, str, int, int]]) -> None:
    """Write observations (name, task, seed, step) as PNG files and their frames.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, task, seed, step in observations:
        _frame(task, seed, step).save(folder / f"{name}.png", optimize=True)
        lines.append(json.dumps({"image": f"{name}.png", "instruction": TASKS[task].instruction}))
    (folder / "frames.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _frame(task: str, seed: int, step: int) -> Image.Image:
    with SimEnvironment(TASKS[task]) as environment:
        environment.reset(seed)
        for _ in range(step):
            environment.step(environment.expert_action())
        return Image.fromarray(environment.frame())


if __name__ == "__main__":
    main()
