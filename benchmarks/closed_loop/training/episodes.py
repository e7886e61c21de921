"""Demonstrations on disk: one compressed .npz an episode, and all of them in memory for training.

Shape legend: N frames of an episode, L steps of it, S image side in pixels, A action steps of a chunk.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.closed_loop.simulation.tasks import TASKS

CHUNK = 16
"""Action steps that the policy predicts at once."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Episode:
    """One demonstration."""

    frames: NDArray[np.uint8]
    """Squashed camera frames [N,S,S,3]."""
    steps: NDArray[np.int64]
    """Control step at which each frame was taken, [N]."""
    actions: NDArray[np.float32]
    """The expert's action at every control step, [L,7]; L exceeds the last frame's step by at least a chunk."""
    states: NDArray[np.float32]
    """Positions of gripper, object and goal at each frame, [N,9], metres."""

    def save(self, file: Path) -> None:
        """Write the episode, whole or not at all."""
        partial = file.with_suffix(".partial.npz")
        np.savez_compressed(partial, frames=self.frames, steps=self.steps, actions=self.actions, states=self.states)
        partial.replace(file)

    @classmethod
    def load(cls, file: Path) -> "Episode":
        """Read an episode back."""
        with np.load(file, allow_pickle=False) as arrays:
            return cls(**{name: arrays[name] for name in ("frames", "steps", "actions", "states")})


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Demonstrations:
    """All frames of a folder of episodes, with the action chunk that follows each."""

    frames: NDArray[np.uint8]
    """[M,S,S,3]."""
    chunks: NDArray[np.float32]
    """[M,A,7], in the units of the environment."""
    states: NDArray[np.float32]
    """[M,9], metres."""
    actions: NDArray[np.float32]
    """Every action of every episode up to its last frame, [K,7]: what the statistics are taken of."""
    rows: Mapping[str, NDArray[np.int64]]
    """Which of the M frames belong to each task."""
    episodes: Mapping[str, int]
    """Episodes of each task."""


def load_demonstrations(
    folder: Path, names: Collection[str] = tuple(TASKS), limit: int | None = None
) -> Demonstrations:
    """Read the episodes that collect.py wrote, `folder/TASK/SEED.npz`, in the order of their names.

    Args:
        folder: what collect.py was given.
        names: which tasks.
        limit: the most episodes of a task; None for all.

    Raises:
        FileNotFoundError: a task has no episodes; the message names the command that makes them.
    """
    parts: list[tuple[str, Episode]] = []
    tasks = [task for task in TASKS if task in names]
    for task in tasks:
        files = sorted((folder / task).glob("[0-9]*.npz"))[:limit]
        if not files:
            command = f"python -m benchmarks.closed_loop.training.collect {folder}"
            raise FileNotFoundError(f"{folder / task}: no episodes; run {command}")
        parts += [(task, Episode.load(file)) for file in files if not file.name.endswith(".partial.npz")]
    owners = np.repeat([task for task, _ in parts], [len(episode.frames) for _, episode in parts])
    return Demonstrations(
        frames=np.concatenate([episode.frames for _, episode in parts]),
        chunks=np.concatenate([_chunks(episode.actions, episode.steps) for _, episode in parts]),
        states=np.concatenate([episode.states for _, episode in parts]),
        actions=np.concatenate([episode.actions[: episode.steps[-1] + 1] for _, episode in parts]),
        rows={task: np.flatnonzero(owners == task) for task in tasks},
        episodes={task: sum(owner == task for owner, _ in parts) for task in tasks},
    )


def _chunks(actions: NDArray[np.float32], steps: Sequence[int] | NDArray[np.int64]) -> NDArray[np.float32]:
    return np.stack([actions[step : step + CHUNK] for step in steps])
