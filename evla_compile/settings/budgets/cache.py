"""How often the action head's blocks are recomputed (EfficientVLA section 3.4); no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from evla_compile.settings.budgets.budget import Budget, Decision, Measured
from evla_compile.settings.schedule import DIFFUSION_STEPS
from evla_compile.settings.setting import setting, whole_from
from evla_compile.settings.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDecision(Decision):
    """The interval; nothing is measured for it."""

    interval: int
    """Denoising steps between two recomputations."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether every step recomputes."""
        del sizes
        return self.interval == 1


@dataclass(frozen=True, kw_only=True)
class CacheBudget(Budget):
    """Denoising steps that reuse what an earlier one computed."""

    decision: ClassVar[type[Decision]] = CacheDecision

    cache_interval: int = setting(
        5,
        text="Denoising steps from one recomputation to the next.",
        read=whole_from(1, DIFFUSION_STEPS),
        off=1,
    )
    """Denoising steps between two recomputations of the DiT's blocks (the paper's N); 1 recomputes always."""

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the interval; nothing is measured for it."""
        del sizes, measured, earlier
        return (CacheDecision(interval=self.cache_interval),)
