"""CogACT's noise schedule and DDIM sampler: squared-cosine betas, epsilon prediction, eta 0, no clipping.

Tables and coefficients are float64 on the host; a step is rounded to two float32 scalars.
"""

import math
from dataclasses import dataclass

from evla_compile.arguments import is_whole

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
