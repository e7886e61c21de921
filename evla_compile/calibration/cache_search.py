"""Measure how far actions move where only some denoising steps compute, to choose which ones (see `CacheBudget`).

Shape legend: F frames, R rows, several noises of each frame, A action steps of a chunk, W action dimensions, Z width of
the cognition feature, G guided rows (2R with guidance, else R), D width of the action head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.inputs import draw_noise
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.schedule import ddim_schedule

_FEWEST_ROWS = 64  # of frames and noises, so that the choice does not hang on a single draw
_MOST_ROWS = 256  # computed at once


class CacheShift:
    """Measures how far actions move where some denoising steps alone compute; see `Measured.cache_shift`.

    An action is a sample clipped to [-1,1]. Every frame is run from at least one noise of its own, so many that there
    are 64 runs or more.
    """

    def __init__(
        self,
        policy: CogACT,
        features: Tensor,
        config: CompileConfig,
        begin: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        """Run the sampler with all steps computed.

        Args:
            policy: the dense policy.
            features: its cognition feature of every frame, float32 [F,Z].
            config: the sampler settings, and whether reused steps extrapolate.
            begin: called in front of the first measurement; returns what is called behind each.
        """
        draws = -(-_FEWEST_ROWS // len(features))
        shape = (draws, policy.sizes.action.chunk, policy.sizes.action.action_width)
        noise = torch.cat([torch.from_numpy(draw_noise(shape, seed)) for seed in range(len(features))])  # [R,A,W]
        dtype = next(policy.action_model.parameters()).dtype
        conditions = features.to(dtype)[:, None].repeat_interleave(draws, dim=0)  # [R,1,Z]
        noise = noise.to(features.device)
        self._samplers = [
            _CachedSampler(policy, conditions[first : first + _MOST_ROWS], noise[first : first + _MOST_ROWS], config)
            for first in range(0, len(noise), _MOST_ROWS)
        ]
        self._begin = begin
        self._tick: Callable[[], None] | None = None
        self._reference = self._actions(tuple(range(config.denoising_steps)))  # [R,A,W]

    def __call__(self, steps: tuple[int, ...]) -> float:
        """Return the mean distance of the action chunks from those of all steps, over the mean length of these."""
        self._tick = self._tick or self._begin()
        moved = self._actions(steps) - self._reference
        self._tick()
        return float(moved.flatten(1).norm(dim=1).mean() / self._reference.flatten(1).norm(dim=1).mean())

    def _actions(self, steps: tuple[int, ...]) -> Tensor:
        with torch.no_grad():
            return torch.cat([sampler.samples(steps) for sampler in self._samplers]).clamp(-1.0, 1.0)


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


class _CachedSampler:
    """Runs the sampler on some rows, with some steps computed; what two runs in a row begin with runs once."""

    def __init__(self, policy: CogACT, condition: Tensor, noise: Tensor, config: CompileConfig) -> None:
        self._net, self._condition = policy.action_model.net, condition
        self._scale, self._extrapolate = config.cfg_scale, config.cache_extrapolate
        self._schedule = ddim_schedule(config.ddim_steps)
        self._states = [_State(noise)]  # in front of every step of the last run, and behind its last one
        self._computed: list[bool] = []

    def samples(self, steps: tuple[int, ...]) -> Tensor:
        """Return raw samples [R,A,W] where `steps` alone compute."""
        computed = [step in steps for step in range(len(self._schedule))]
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
