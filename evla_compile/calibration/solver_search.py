"""Run DPM-Solver++(2M) at some timesteps, to choose them (see `SamplerBudget`).

Shape legend: R rows, A action steps of a chunk, W action dimensions, Z width of the cognition feature.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from evla_compile.calibration.action_shift import SamplerRun
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.schedule import SolverStep, solver_schedule


@dataclass(frozen=True, slots=True)
class _State:
    """What the network has computed at one timestep, [R,A,W] each."""

    x: Tensor
    """Noisy actions."""
    noise: Tensor
    """Predicted noise."""


class SolverRun(SamplerRun):
    """Runs the solver; what two runs in a row begin with runs once."""

    def __init__(self, policy: CogACT, config: CompileConfig, condition: Tensor, noise: Tensor) -> None:
        """Keep what it starts from.

        Args:
            policy: the dense policy.
            config: guidance.
            condition: cognition features, [R,1,Z].
            noise: [R,A,W].
        """
        self._model, self._scale = policy.action_model, config.cfg_scale
        self._condition, self._noise = condition, noise
        self._states: list[_State] = []  # at every timestep of the last run
        self._timesteps: tuple[int, ...] = ()

    def samples(self, candidate: tuple[int, ...]) -> Tensor:
        """Return raw samples [R,A,W] of the solver at the timesteps `candidate`."""
        pairs = enumerate(zip(candidate, self._timesteps, strict=False))
        first = next((place for place, (new, old) in pairs if new != old), min(len(candidate), len(self._timesteps)))
        del self._states[first:]
        schedule, self._timesteps = solver_schedule(candidate), candidate
        for place in range(first, len(candidate)):
            x = self._next(schedule, place - 1) if place else self._noise
            timestep = torch.tensor([float(candidate[place])], device=x.device)
            self._states.append(_State(x, self._model(x, timestep, self._condition, self._scale)))
        return self._next(schedule, len(candidate) - 1)

    def _next(self, schedule: tuple[SolverStep, ...], place: int) -> Tensor:
        """Return the noisy actions behind a step."""
        step, state = schedule[place], self._states[place]
        x = step.sample * state.x + step.noise * state.noise
        if step.earlier == 0.0:
            return x
        before, earlier = schedule[place - 1], self._states[place - 1]
        return x + step.earlier * (before.data_sample * earlier.x + before.data_noise * earlier.noise)
