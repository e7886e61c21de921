"""Episodes: a policy in the simulator, open loop over chunks or with CogACT's adaptive ensemble."""

import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from time import perf_counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.closed_loop.evaluation.variants import Policy, Prepared
from benchmarks.closed_loop.simulation.environment import SimEnvironment
from benchmarks.closed_loop.simulation.tasks import MAX_STEPS, TASKS
from evla_compile.host.inputs import draw_noise
from evla_compile.host.simpler import AdaptiveEnsembler

ENSEMBLE_HORIZON = 7
"""Action chunks that the adaptive ensemble looks back on, as CogACT does on the WidowX."""

PICTURE_EVERY = 4
"""Control steps between two frames that are kept for a picture."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Execution:
    """How every variant's episodes are run."""

    execute: int | None
    """Actions of a chunk executed before the next call; None for the adaptive ensemble, a call each step."""
    threads: int
    """Threads of each policy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EpisodeResult:
    """Result of one episode."""

    variant: str
    """The variant's name."""
    task: str
    """The task."""
    seed: int
    """Seed of the initial state."""
    success: bool
    """Whether the task succeeded within `MAX_STEPS`."""
    steps: int
    """Control steps until then, or `MAX_STEPS`."""
    milliseconds: tuple[float, ...]
    """Time of every call but the first, from frame and instruction to actions."""

    def to_json(self) -> dict[str, Any]:
        """Return the result as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "EpisodeResult":
        """Read `to_json`'s form back."""
        return cls(**{**data, "milliseconds": tuple(data["milliseconds"])})


@dataclass(frozen=True, kw_only=True, slots=True)
class Deviation:
    """How far a variant's actions are from the reference's along one episode of the reference."""

    variant: str
    """The variant's name."""
    task: str
    """The task."""
    seed: int
    """Seed of the initial state."""
    millimetres: float
    """Mean over calls and action steps of the distance between the two translations of a control step."""


def call_noise(shape: tuple[int, ...], *, noise: int, task: str, seed: int, call: int) -> NDArray[np.float32]:
    """Return the initial noise of one call: the same for every variant that uses this set of noises."""
    return draw_noise(shape, zlib.crc32(f"{noise}/{task}/{seed}/{call}".encode()))


def run_episode(
    environment: SimEnvironment,
    policy: Policy,
    execution: Execution,
    *,
    variant: str,
    task: str,
    seed: int,
    noise: int,
    frames: list[Image.Image] | None = None,
) -> EpisodeResult:
    """Run a policy from the initial state that the seed decides until success or `MAX_STEPS`.

    Args:
        environment: the task's environment.
        policy: what drives it.
        execution: how chunks are executed.
        variant: name of the variant, for the result.
        task: name of the task.
        seed: decides the initial state.
        noise: which set of initial noises.
        frames: a list to which every fourth step's frame and the last one are appended; None for no pictures.
    """
    environment.reset(seed)
    times: list[float] = []
    steps = 0
    for actions in _act(environment, policy, execution, task=task, seed=seed, noise=noise, times=times):
        for action in actions:
            if frames is not None and steps % PICTURE_EVERY == 0:
                frames.append(Image.fromarray(environment.frame()))
            environment.step(action)
            steps += 1
            if environment.success or steps == MAX_STEPS:
                if frames is not None:
                    frames.append(Image.fromarray(environment.frame()))
                return EpisodeResult(
                    variant=variant,
                    task=task,
                    seed=seed,
                    success=environment.success,
                    steps=steps,
                    milliseconds=tuple(round(time, 3) for time in times[1:]),
                )
    raise AssertionError("a policy acts until the episode ends")


def run_deviation(
    environment: SimEnvironment,
    policies: Mapping[str, Policy],
    execution: Execution,
    *,
    reference: str,
    task: str,
    seed: int,
) -> list[Deviation]:
    """Drive an episode with the reference, ask every policy at each of its frames, and compare their actions.

    Noise set 0 serves all, so that only the policies differ.
    """
    distances: dict[str, list[float]] = {name: [] for name in policies}
    environment.reset(seed)
    executed = execution.execute or ENSEMBLE_HORIZON
    for call in range(-(-MAX_STEPS // executed)):
        frame = environment.frame()
        chunks = {}
        for name, policy in policies.items():
            start = call_noise(_noise_shape(policy), noise=0, task=task, seed=seed, call=call)
            chunks[name] = policy.predict_action(frame, TASKS[task].instruction, noise=start)[:executed]
        for name, chunk in chunks.items():
            apart = np.linalg.norm(chunk[:, :3] - chunks[reference][:, :3], axis=1)
            distances[name].append(1000.0 * float(apart.mean()))
        for action in chunks[reference]:
            if environment.step(action):
                return [
                    Deviation(variant=name, task=task, seed=seed, millimetres=float(np.mean(found)))
                    for name, found in distances.items()
                ]
    return [
        Deviation(variant=name, task=task, seed=seed, millimetres=float(np.mean(found)))
        for name, found in distances.items()
    ]


def _act(
    environment: SimEnvironment,
    policy: Policy,
    execution: Execution,
    *,
    task: str,
    seed: int,
    noise: int,
    times: list[float],
) -> Iterator[NDArray[np.float64]]:
    """Yield actions [K,7] to execute, asking the policy whenever they are used up."""
    ensembler = AdaptiveEnsembler(ENSEMBLE_HORIZON) if execution.execute is None else None
    for call in range(MAX_STEPS):
        start = call_noise(_noise_shape(policy), noise=noise, task=task, seed=seed, call=call)
        frame = environment.frame()
        began = perf_counter()
        chunk = policy.predict_action(frame, TASKS[task].instruction, noise=start)
        times.append(1000.0 * (perf_counter() - began))
        yield chunk[: execution.execute] if ensembler is None else ensembler.add(chunk)[None]


def _noise_shape(policy: Any) -> tuple[int, ...]:
    """Return the noise shape of one row, from a compiled policy's signature or a dense policy's sizes."""
    if hasattr(policy, "noise_shape"):
        return tuple(policy.noise_shape)
    return (1, policy.sizes.action.chunk, policy.sizes.action.action_width)


class Worker:
    """One process of an evaluation, with its environments and policies, which are opened when first needed."""

    def __init__(self, prepared: Mapping[str, Prepared], execution: Execution) -> None:
        self._prepared, self._execution = prepared, execution
        self._environment = cache(lambda task: SimEnvironment(TASKS[task]))
        self._policy = cache(lambda variant: prepared[variant].open(execution.threads))

    def episode(self, variant: str, task: str, seed: int) -> EpisodeResult:
        """Run one episode."""
        return run_episode(
            self._environment(task),
            self._policy(variant),
            self._execution,
            variant=variant,
            task=task,
            seed=seed,
            noise=self._prepared[variant].variant.noise,
        )

    def deviations(self, reference: str, task: str, seed: int) -> list[Deviation]:
        """Compare all variants along one episode of the reference."""
        policies = {name: self._policy(name) for name in self._prepared}
        return run_deviation(
            self._environment(task), policies, self._execution, reference=reference, task=task, seed=seed
        )
