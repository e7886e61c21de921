"""Render frames for calibration, and one for the demo.

    python -m benchmarks.closed_loop.training.calibration_frames RUN
    python -m benchmarks.closed_loop.training.calibration_frames FOLDER --per-task 146

They come from experts' episodes of seeds that neither training nor evaluation uses. A smaller set is the beginning of
a larger one, task by task: each next frame of a task is of another episode, and of another part of it.
"""

import argparse
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from PIL import Image

from benchmarks.closed_loop.simulation.environment import SimEnvironment, simulator_lack
from benchmarks.closed_loop.simulation.tasks import CALIBRATION_SEED, EVALUATION_SEEDS, MAX_STEPS, TASKS

PER_TASK = 40
"""Frames of each task that the demo policy ships."""
EPISODES = 20
"""Episodes of each task that the frames are taken from in turn."""
DEMO_TASK, DEMO_SEED, DEMO_STEP = "door-open", EVALUATION_SEEDS - 1, 12
"""Task, seed and step of the demo's frame."""
SIDE = 112
"""Side in pixels of a calibration frame: what the policy's processor squashes a camera frame to, and leaves alone."""
QUALITY = 92
"""Quality of a calibration frame's JPEG, its colours at full resolution: 5 kB a frame."""

_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, spread evenly however many there are


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the frames and their list."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", metavar="RUN", type=Path, help="where to: RUN/calibration and RUN/demo")
    parser.add_argument("--per-task", type=int, default=PER_TASK, help="frames of each task (default: %(default)s)")
    given = parser.parse_args(arguments)
    if given.per_task < 1:
        parser.error(f"--per-task {given.per_task}: expected a whole number from 1 up")
    if lack := simulator_lack():
        parser.error(lack)
    _write_calibration(given.folder / "calibration", given.per_task)
    _write_demo(given.folder / "demo")


def _write_calibration(folder: Path, per_task: int) -> None:
    """Write the frames of all tasks as JPEG files, and their frames.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for name, task in TASKS.items():
        found: dict[int, tuple[str, str]] = {}
        with SimEnvironment(task) as environment:
            for episode in range(min(EPISODES, per_task)):
                seed, numbers = CALIBRATION_SEED + episode, range(episode, per_task, EPISODES)
                length = _length(environment, seed)
                steps = {int(number * _GOLDEN % 1.0 * length): number for number in numbers}
                if len(steps) < len(numbers):
                    raise ValueError(f"--per-task {per_task}: expected fewer; {name} {seed} has {length} steps")
                for step, frame in _frames(environment, seed, steps):
                    file = f"{name}-{seed}-{step:03}.jpg"
                    squashed = frame.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
                    squashed.save(folder / file, quality=QUALITY, subsampling=0, optimize=True)
                    found[steps[step]] = (file, f"{name}-{seed}")
        for number in sorted(found):
            file, label = found[number]
            lines.append(json.dumps({"image": file, "instruction": task.instruction, "episode": label}))
    (folder / "frames.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _write_demo(folder: Path) -> None:
    """Write the demo's frame as a camera takes it, a PNG file, and its frames.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    task = TASKS[DEMO_TASK]
    with SimEnvironment(task) as environment:
        ((_, frame),) = _frames(environment, DEMO_SEED, [DEMO_STEP])
    frame.save(folder / f"{DEMO_TASK}.png", optimize=True)
    line = json.dumps({"image": f"{DEMO_TASK}.png", "instruction": task.instruction})
    (folder / "frames.jsonl").write_text(line + "\n", encoding="utf-8")


def _length(environment: SimEnvironment, seed: int) -> int:
    """Return after how many steps the expert succeeds; `MAX_STEPS` where it does not."""
    environment.reset(seed)
    for step in range(MAX_STEPS):
        if environment.step(environment.expert_action()):
            return step + 1
    return MAX_STEPS


def _frames(environment: SimEnvironment, seed: int, steps: Collection[int]) -> Iterator[tuple[int, Image.Image]]:
    """Yield the camera frames of an expert's episode at some of its control steps."""
    environment.reset(seed)
    for step in range(max(steps) + 1):
        if step in steps:
            yield step, Image.fromarray(environment.frame())
        environment.step(environment.expert_action())


if __name__ == "__main__":
    main()
