"""Pictures of the same episodes driven by several variants, side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from benchmarks.closed_loop.evaluation.rollout import Execution, run_episode
from benchmarks.closed_loop.evaluation.variants import Prepared
from benchmarks.closed_loop.simulation.environment import SimEnvironment
from benchmarks.closed_loop.simulation.tasks import TASKS

PICTURES = 6
"""Frames of an episode that are shown, spread evenly from its start to its end."""
SIDE = 128
"""Side of a frame in pixels."""
LABEL = 14
"""Height in pixels of the line above a strip."""


def draw_strips(
    prepared: Mapping[str, Prepared], execution: Execution, tasks: Sequence[str], seed: int, file: Path
) -> None:
    """Run one episode of each task with each variant and draw it as a row of frames, as a PNG."""
    rows = []
    policies = {name: variant.open(execution.threads) for name, variant in prepared.items()}
    for task in tasks:
        with SimEnvironment(TASKS[task]) as environment:
            for name, policy in policies.items():
                frames: list[Image.Image] = []
                result = run_episode(
                    environment,
                    policy,
                    execution,
                    variant=name,
                    task=task,
                    seed=seed,
                    noise=prepared[name].variant.noise,
                    frames=frames,
                )
                outcome = f"done after {result.steps} steps" if result.success else "not done"
                rows.append(_strip(frames, f"{name}: {TASKS[task].instruction} ({outcome})"))
    Image.fromarray(np.vstack(rows)).save(file, optimize=True)


def _strip(frames: Sequence[Image.Image], label: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    strip = Image.new("RGB", (PICTURES * SIDE, SIDE + LABEL), "white")
    ImageDraw.Draw(strip).text((2, 1), label, fill="black")
    for place, index in enumerate(np.linspace(0, len(frames) - 1, PICTURES).round().astype(int)):
        strip.paste(frames[index].resize((SIDE, SIDE), Image.Resampling.BICUBIC), (place * SIDE, LABEL))
    return np.asarray(strip)
