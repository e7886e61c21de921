"""Runs of the action head on calibration frames, and how far a sampler's actions are from the dense policy's.

Shape legend: F frames, R rows, several noises of each frame, A action steps of a chunk, W action dimensions, Z width of
the cognition feature.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.inputs import draw_noise
from evla_compile.settings.config import CompileConfig

_FEWEST_ROWS = 64  # of frames and noises, so that the choice does not hang on a single draw
_MOST_ROWS = 256  # computed at once


class SamplerRun(ABC):
    """Runs samplers on some rows."""

    @abstractmethod
    def samples(self, candidate: tuple[int, ...]) -> Tensor:
        """Return raw samples [R,A,W] of a sampler, told by its steps or timesteps."""


class ActionShift:
    """Measures how far actions of a sampler are from those of the dense policy's; see `Measured.cache_shift`.

    An action is a sample clipped to [-1,1]. Every frame is run from at least one noise of its own, so many that there
    are 64 runs or more. The distance is Euclidean over a chunk, so that it is ruled by the steps that deviate most.
    """

    def __init__(
        self,
        policy: CogACT,
        features: Tensor,
        config: CompileConfig,
        run: Callable[[Tensor, Tensor], SamplerRun],
        begin: Callable[[], Callable[[], None]] = lambda: lambda: None,
    ) -> None:
        """Run the dense policy's sampler.

        Args:
            policy: the dense policy.
            features: its cognition feature of every frame, float32 [F,Z].
            config: denoising steps and guidance.
            run: what runs samplers on rows, given their cognition features [R,1,Z] and noises [R,A,W].
            begin: called in front of the first measurement; returns what is called behind each.
        """
        draws = -(-_FEWEST_ROWS // len(features))
        shape = (draws, policy.sizes.action.chunk, policy.sizes.action.action_width)
        noise = torch.cat([torch.from_numpy(draw_noise(shape, seed)) for seed in range(len(features))])  # [R,A,W]
        dtype = next(policy.action_model.parameters()).dtype
        conditions = features.to(dtype)[:, None].repeat_interleave(draws, dim=0)  # [R,1,Z]
        parts = [slice(first, first + _MOST_ROWS) for first in range(0, len(noise), _MOST_ROWS)]
        rows = [(conditions[part], noise[part].to(features.device)) for part in parts]
        self._runs = [run(*each) for each in rows]
        self._begin = begin
        self._tick: Callable[[], None] | None = None
        self._reference = torch.cat(
            [policy.denoise(*each, ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale) for each in rows]
        ).clamp(-1.0, 1.0)  # [R,A,W]

    def __call__(self, candidate: tuple[int, ...]) -> float:
        """Return the mean distance of the action chunks from the dense policy's, over the mean length of these."""
        self._tick = self._tick or self._begin()
        with torch.no_grad():
            actions = torch.cat([run.samples(candidate) for run in self._runs]).clamp(-1.0, 1.0)
        self._tick()
        moved = (actions - self._reference).flatten(1).norm(dim=1)  # [R]
        return float(moved.mean() / self._reference.flatten(1).norm(dim=1).mean())
