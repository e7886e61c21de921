"""Let Meta-World's scripted experts demonstrate the tasks, one .npz an episode, in parallel and resumable.

    python -m benchmarks.closed_loop.training.collect FOLDER --episodes 300 --workers 2
    python -m benchmarks.closed_loop.training.collect FOLDER --first-seed 300 --episodes 200 --wander 40 --workers 2

Half of the 10-step segments of an episode carry Gaussian noise on the executed translation, so that the policy sees how
the expert recovers; what is recorded is the expert's clean action. With --wander the arm first goes somewhere else,
unrecorded, so that where it is does not tell where the goal is. Episodes in which the expert fails are dropped and
counted.
"""

import argparse
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import track

from benchmarks.closed_loop.simulation.environment import STEP_METRES, SimEnvironment, simulator_lack
from benchmarks.closed_loop.simulation.tasks import CALIBRATION_SEED, TASKS
from benchmarks.closed_loop.training.episodes import CHUNK, Episode
from evla_compile.host.processor import GRIPPER
from evla_compile.settings.sizes import ACTION_WIDTH

FRAME_EVERY = 3
"""Control steps between two recorded frames."""
SEGMENT = 10
"""Control steps of a segment that is noisy or clean."""
NOISE = 0.5
"""Standard deviation of the noise, in environment units (0.01 m a step)."""
MAX_DEMONSTRATION_STEPS = 200
"""Steps within which the expert has to succeed; its noisy path is longer than a clean one."""
WANDER_BOX = ((-0.25, 0.45, 0.08), (0.25, 0.75, 0.35))
"""Lowest and highest point in metres to which the arm wanders, in front of the objects."""
HALF_OPEN_SHARE = 3
"""One in so many of a window's demonstrations starts half open."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    task: str
    seed: int
    file: Path


def demonstrate(environment: SimEnvironment, seed: int, side: int, *, wander: int = 0) -> Episode | None:
    """Return the expert's episode of a seed; None where the expert fails.

    Args:
        environment: the task.
        seed: decides the episode.
        side: side of the frames in pixels, to which they are squashed.
        wander: the most control steps that the arm goes somewhere else before the expert takes over; not recorded.
    """
    generator = np.random.Generator(np.random.PCG64([seed, *environment.task.environment.encode()]))
    environment.reset(seed, half_open=environment.task.half_open and seed % HALF_OPEN_SHARE == 0)
    if wander:
        _wander(environment, generator, int(generator.integers(wander + 1)))
    frames, steps, states = [], [], []
    actions: list[NDArray[np.float64]] = []
    while not environment.success and len(actions) < MAX_DEMONSTRATION_STEPS:
        step = len(actions)
        if step % FRAME_EVERY == 0:
            frame = Image.fromarray(environment.frame())
            frames.append(np.asarray(frame.resize((side, side), Image.Resampling.BICUBIC)))
            steps.append(step)
            states.append(environment.state())
        if step % SEGMENT == 0:
            deviation = STEP_METRES * NOISE * (generator.random() < 0.5)
        actions.append(environment.expert_action())
        executed = actions[-1].copy()
        executed[:3] += deviation * generator.standard_normal(3)
        environment.step(executed)
    if not environment.success or not frames:  # done before the expert began
        return None
    for _ in range(CHUNK):  # the last frames' chunks reach beyond success
        actions.append(environment.expert_action())
        environment.step(actions[-1])
    return Episode(
        frames=np.stack(frames),
        steps=np.array(steps, dtype=np.int64),
        actions=np.stack(actions).astype(np.float32),
        states=np.stack(states).astype(np.float32),
    )


def _wander(environment: SimEnvironment, generator: np.random.Generator, steps: int) -> None:
    """Move the open gripper towards a random point."""
    target = generator.uniform(*WANDER_BOX)
    for _ in range(steps):
        action = np.zeros(ACTION_WIDTH)
        action[:3] = np.clip(target - environment.state()[:3], -STEP_METRES, STEP_METRES)
        action[GRIPPER] = 1.0
        environment.step(action)


def main(arguments: Sequence[str] | None = None) -> None:
    """Collect what is missing in the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", type=Path, help="where to; episodes that lie there already are kept")
    parser.add_argument("--episodes", type=int, default=300, help="seeds of each task (default: 300)")
    parser.add_argument("--first-seed", type=int, default=0, help="seed of the first episode (default: 0)")
    parser.add_argument("--wander", type=int, default=0, help="most steps elsewhere before the expert (default: 0)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--side", type=int, default=112, help="side of the stored frames in pixels (default: 112)")
    parser.add_argument("--workers", type=int, default=2, help="processes (default: 2)")
    given = parser.parse_args(arguments)
    if lack := simulator_lack():
        parser.error(lack)
    seeds = range(given.first_seed, given.first_seed + given.episodes)
    if not (seeds and 0 <= seeds[0] <= seeds[-1] < CALIBRATION_SEED):
        parser.error(
            f"--first-seed {given.first_seed} --episodes {given.episodes}: expected seeds from 0 to"
            f" {CALIBRATION_SEED - 1}; later ones are for calibration and evaluation"
        )
    console = Console(soft_wrap=True)
    work = [
        _Work(task=task, seed=seed, file=given.folder / task / f"{seed:05}.npz")
        for seed in seeds
        for task in given.tasks
    ]
    for task in given.tasks:
        (given.folder / task).mkdir(parents=True, exist_ok=True)
    missing = [item for item in work if not item.file.exists() and not _failed(item.file).exists()]
    # spawned, since a renderer does not survive a fork
    with multiprocessing.get_context("spawn").Pool(given.workers) as pool:
        done = pool.imap_unordered(partial(_collect, side=given.side, wander=given.wander), missing)
        for _ in track(done, description="demonstrations", total=len(missing), console=console):
            pass
    failures = Counter(item.task for item in work if _failed(item.file).exists())
    for task in given.tasks:
        console.print(f"{task}: {given.episodes - failures[task]} episodes, {failures[task]} dropped (expert failed)")


def _collect(item: _Work, *, side: int, wander: int) -> None:
    episode = demonstrate(_environment(item.task), item.seed, side, wander=wander)
    if episode is None:
        _failed(item.file).touch()
    else:
        episode.save(item.file)


@cache
def _environment(task: str) -> SimEnvironment:
    """Return a task's environment, which lives as long as the process: making one takes longer than an episode."""
    return SimEnvironment(TASKS[task])


def _failed(file: Path) -> Path:
    return file.with_suffix(".failed")


if __name__ == "__main__":
    main()
