"""Run the sampler with only some denoising steps computed, to choose which ones (see `CacheBudget`).

Shape legend: R rows, A action steps of a chunk, W action dimensions, Z width of the cognition feature, G guided rows
(2R with guidance, else R), D width of the action head.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evla_compile.calibration.action_shift import SamplerRun
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.schedule import ddim_schedule


@dataclass(frozen=True, slots=True)
class _State:
    """What one denoising step leaves for the next."""

    x: Tensor
    """Noisy actions, [R,A,W]."""
    step: int = 0
    """Last computed step, i."""
    features: Tensor | None = None
    """C_i, see `evla_compile.passes.CacheFeatures`, [G,A,D]."""
    rise: Tensor | None = None
    """(C_i - C_j) / (i - j) where reused steps extrapolate and there is a step j, [G,A,D]."""


class CachedRun(SamplerRun):
    """Runs DDIM with some steps computed; what two runs in a row begin with runs once."""

    def __init__(self, policy: CogACT, config: CompileConfig, condition: Tensor, noise: Tensor) -> None:
        """Keep what it starts from.

        Args:
            policy: the dense policy.
            config: denoising steps and guidance, and whether reused steps extrapolate.
            condition: cognition features, [R,1,Z].
            noise: [R,A,W].
        """
        self._net, self._condition = policy.action_model.net, condition
        self._scale, self._extrapolate = config.cfg_scale, config.cache_extrapolate
        self._schedule = ddim_schedule(config.ddim_steps)
        self._states = [_State(noise)]  # in front of every step of the last run, and behind its last one
        self._computed: list[bool] = []

    def samples(self, candidate: tuple[int, ...]) -> Tensor:
        """Return raw samples [R,A,W] where the steps `candidate` alone compute."""
        computed = [step in candidate for step in range(len(self._schedule))]
        pairs = enumerate(zip(computed, self._computed, strict=False))
        first = next((step for step, (new, old) in pairs if new != old), len(self._computed))
        del self._states[first + 1 :]
        for step in range(first, len(computed)):
            self._states.append(self._behind(self._states[-1], step, compute=computed[step]))
        self._computed = computed
        return self._states[-1].x

    def _behind(self, state: _State, step: int, *, compute: bool) -> _State:
        """Return the state behind a step."""
        about, net, x = self._schedule[step], self._net, state.x
        timestep = torch.tensor([float(about.timestep)], device=x.device)
        hidden = net.embed(x, timestep, self._condition, self._scale)  # [G,1+A,D]
        tokens = hidden[:, 1:]
        if compute or state.features is None:
            for block in net.blocks:
                hidden = block(hidden)
            result = hidden[:, 1:]
            features, rise = result - tokens, None
            if self._extrapolate and state.features is not None:
                rise = (features - state.features) / (step - state.step)
            state = _State(x, step, features, rise)
        elif state.rise is not None:
            result = tokens + (state.features + state.rise * (step - state.step))
        else:
            result = tokens + state.features
        noise = net.read_noise(result, self._scale, x.dtype)
        return replace(state, x=about.sample * x + about.noise * noise)
