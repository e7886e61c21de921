"""CogACT's noise schedule, and the samplers on it: squared-cosine betas, epsilon prediction, no clipping.

DDIM with eta 0 is CogACT's own; DPM-Solver++(2M) needs fewer steps. Tables and coefficients are float64 on the host; a
step is rounded to float32 scalars.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from evla_compile.arguments import is_listed, is_whole

DIFFUSION_STEPS = 100
"""Length of the training noise schedule of every published CogACT (T in the paper)."""

DDIM_STEPS = 10
"""Denoising steps with which CogACT is evaluated."""

VALID_DDIM_STEPS = tuple(
    steps
    for steps in range(1, DIFFUSION_STEPS + 1)
    if any(-(-DIFFUSION_STEPS // stride) == steps for stride in range(1, DIFFUSION_STEPS + 1))
)
"""Step counts that some integer stride over the schedule yields."""


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """One DDIM step, x <- sample * x + noise * eps."""

    timestep: int
    """Index on the training schedule, an input of the network."""
    sample: float
    """Coefficient of the noisy actions."""
    noise: float
    """Coefficient of the predicted noise."""


@dataclass(frozen=True, slots=True)
class SolverStep:
    """One step of DPM-Solver++(2M): d = data_sample x + data_noise eps; x <- sample x + noise eps + earlier d'.

    d is the action chunk that the step predicts, and d' that of the step in front of it.
    """

    timestep: int
    """Index on the training schedule, an input of the network."""
    sample: float
    """Coefficient of the noisy actions."""
    noise: float
    """Coefficient of the predicted noise."""
    earlier: float
    """Coefficient of d'; 0.0 in the first step, which has none, and in the last, which yields d."""
    data_sample: float
    """Coefficient of the noisy actions in d."""
    data_noise: float
    """Coefficient of the predicted noise in d."""


def cumulative_alphas() -> tuple[float, ...]:
    """Return alphabar[0..99] of the squared-cosine schedule, betas capped at 0.999."""

    def envelope(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    values, product = [], 1.0
    for i in range(DIFFUSION_STEPS):
        beta = min(1.0 - envelope((i + 1) / DIFFUSION_STEPS) / envelope(i / DIFFUSION_STEPS), 0.999)
        product *= 1.0 - beta
        values.append(product)
    return tuple(values)


def check_ddim_steps(steps: object) -> int:
    """Return a number of denoising steps as an int, if an integer stride over the schedule yields it.

    Raises:
        ValueError: none does; the message lists the valid counts.
    """
    if not is_whole(steps) or steps not in VALID_DDIM_STEPS:
        valid = ", ".join(map(str, VALID_DDIM_STEPS))
        raise ValueError(f"ddim_steps={steps!r} has no integer stride over {DIFFUSION_STEPS} steps; valid: {valid}")
    return int(steps)


def ddim_timesteps(steps: int) -> tuple[int, ...]:
    """Return the visited indices in descending order: every s-th for the smallest stride s that yields `steps`.

    A single step is a special case, as upstream: it is the middle of the schedule.

    Raises:
        ValueError: no integer stride yields `steps`; the message lists the valid counts.
    """
    steps = check_ddim_steps(steps)
    if steps == 1:
        return (DIFFUSION_STEPS // 2,)
    stride = next(s for s in range(1, DIFFUSION_STEPS + 1) if -(-DIFFUSION_STEPS // s) == steps)
    return tuple(reversed(range(0, DIFFUSION_STEPS, stride)))


def ddim_schedule(steps: int) -> tuple[DenoisingStep, ...]:
    """Return the sampler's steps in the order in which they run.

    With a = alphabar at the step and b = alphabar at the next one (1 after the last), the textbook step
    x0 = x / sqrt(a) - sqrt(1/a - 1) eps, x <- sqrt(b) x0 + sqrt(1 - b) eps is linear in x and eps; its two
    coefficients are combined here in float64.

    Raises:
        ValueError: no integer stride yields `steps`.
    """
    alphas, visited = cumulative_alphas(), ddim_timesteps(steps)
    schedule = []
    for timestep, following in zip(visited, (*visited[1:], None), strict=True):
        a = alphas[timestep]
        b = 1.0 if following is None else alphas[following]
        noise = math.sqrt(1.0 - b) - math.sqrt(b) * math.sqrt(1.0 / a - 1.0)
        schedule.append(DenoisingStep(timestep, math.sqrt(b / a), noise))
    return tuple(schedule)


def check_timesteps(name: str, timesteps: Any) -> tuple[int, ...]:
    """Return timesteps of a solver as a tuple of ints, if they descend on the training schedule.

    Args:
        name: the argument's name, for the message.
        timesteps: a list of whole numbers.

    Raises:
        ValueError: they do not descend, are none, or leave the schedule.
    """
    if is_listed(timesteps) and len(timesteps) and all(is_whole(timestep) for timestep in timesteps):
        found = tuple(int(timestep) for timestep in timesteps)
        if found[0] < DIFFUSION_STEPS and found[-1] >= 0 and all(first > second for first, second in pairwise(found)):
            return found
    raise ValueError(
        f"{name}={timesteps!r}: expected descending timesteps of the training schedule, {DIFFUSION_STEPS - 1} to 0,"
        " such as (90, 45, 10)"
    )


def solver_schedule(timesteps: Sequence[int]) -> tuple[SolverStep, ...]:
    """Return the steps of DPM-Solver++(2M) (arXiv 2211.01095, algorithm 2) in the order in which they run.

    With a = sqrt(alphabar), s = sqrt(1 - alphabar) and l = log(a / s) at each timestep, h = l_next - l and
    r = (l - l_before) / h, a step from x with the data prediction d = (x - s eps) / a, the midpoint form, is
    x <- (s_next / s) x - a_next (exp(-h) - 1) (d + (d - d') / (2 r)). The first step has no d', and leaves the
    second term out; the last one goes to a noise of zero, where x <- d. All of it is linear in x, eps and d'; the
    coefficients are combined here in float64.

    Raises:
        ValueError: the timesteps do not descend on the training schedule.
    """
    visited, alphas = check_timesteps("timesteps", timesteps), cumulative_alphas()
    signal = [math.sqrt(alphas[timestep]) for timestep in visited]
    spread = [math.sqrt(1.0 - alphas[timestep]) for timestep in visited]
    ratio = [math.log(a / s) for a, s in zip(signal, spread, strict=True)]
    schedule = []
    for place, timestep in enumerate(visited):
        data_sample, data_noise = 1.0 / signal[place], -spread[place] / signal[place]
        kept, present, earlier = 0.0, 1.0, 0.0  # of x, d and d'
        if place + 1 < len(visited):
            h = ratio[place + 1] - ratio[place]
            kept, present = spread[place + 1] / spread[place], -signal[place + 1] * math.expm1(-h)
            if place > 0:
                extrapolated = present * h / (2.0 * (ratio[place] - ratio[place - 1]))
                present, earlier = present + extrapolated, -extrapolated
        sample, noise = kept + present * data_sample, present * data_noise
        schedule.append(SolverStep(timestep, sample, noise, earlier, data_sample, data_noise))
    return tuple(schedule)
