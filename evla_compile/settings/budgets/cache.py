"""At which denoising steps the action head's blocks compute (EfficientVLA section 3.4); no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from math import comb
from typing import Any, ClassVar, Self

from evla_compile.arguments import is_listed, is_whole, true_or_false
from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import (
    Budget,
    Decision,
    Measured,
    MeasuredDecision,
    Measurement,
    decision_of,
)
from evla_compile.settings.budgets.plan_values import ascending, index
from evla_compile.settings.budgets.sampler import MOST_SETS, SamplerSettings
from evla_compile.settings.schedule import DIFFUSION_STEPS
from evla_compile.settings.setting import setting, whole_from
from evla_compile.settings.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheDecision(MeasuredDecision):
    """The denoising steps that compute; a plan holds those that were searched, the settings tell all others."""

    keys: ClassVar[Mapping[str, Any]] = {"cache_steps": (), "cache_of_steps": 0, "cache_extrapolate": False}

    steps: tuple[int, ...] = ()
    """Steps that compute, ascending from 0; empty where every step does."""
    of: int = 0
    """Steps of the sampler; 0 where every step computes."""
    extrapolate: bool = False
    """Whether reused steps extrapolate from the last two computed ones."""
    searched: bool = False
    """Whether calibration chose the steps."""

    @property
    def in_plan(self) -> bool:
        """Whether calibration chose the steps: what the settings name is in the settings."""
        return self.searched

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether every step computes."""
        del sizes
        return len(self.steps) == self.of

    def to_json(self) -> dict[str, Any]:
        """Return the steps and what they were searched for; nothing where they were not, as in older plans."""
        if not self.searched:
            return {}
        return {"cache_steps": self.steps, "cache_of_steps": self.of, "cache_extrapolate": self.extrapolate}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        del earlier
        steps, of, extrapolate = data["cache_steps"], index(data["cache_of_steps"]), data["cache_extrapolate"]
        if steps in ((), []) and not of and extrapolate is False:
            return cls()
        if len(steps) > DIFFUSION_STEPS:
            raise ValueError(f"{len(steps)} cache steps: expected at most {DIFFUSION_STEPS}")
        found = ascending([index(step) for step in steps])
        if found[0] != 0 or not found[-1] < of <= DIFFUSION_STEPS or not isinstance(extrapolate, bool):
            raise ValueError(
                f"cache_steps {found!s:.60} of {of!s:.20}, cache_extrapolate {extrapolate!r:.20}: expected steps from 0"
                f" to below {of!s:.20}, a sampler of at most {DIFFUSION_STEPS} steps, and true or false"
            )
        return cls(steps=found, of=of, extrapolate=extrapolate, searched=True)


def _read_steps(name: str, steps: Any) -> int | tuple[int, ...] | None:
    """Return denoising steps, or their number, as plain values; a refusal names what is wrong with them."""
    if steps is None:
        return None
    if is_whole(steps) and 1 <= steps <= DIFFUSION_STEPS:
        return int(steps)
    if not is_listed(steps) or not len(steps) or any(not is_whole(step) for step in steps):
        raise ValueError(
            f"{name}={steps!r}: expected the denoising steps that compute, as (0, 3, 7), their number, from 1 to"
            f" {DIFFUSION_STEPS}, or None"
        )
    found = tuple(int(step) for step in steps)
    if found[0] != 0 or any(first >= second for first, second in pairwise(found)):
        raise ValueError(
            f"{name}={steps!r}: steps must begin with 0, which has none to reuse, and ascend without repeats, as in"
            " (0, 3, 7)"
        )
    return found


def _parse_steps(text: str) -> int | tuple[int, ...] | None:
    if text == "uniform":
        return None
    return tuple(int(step) for step in text.removesuffix(",").split(",")) if "," in text else int(text)


@dataclass(frozen=True, kw_only=True)
class CacheBudget(SamplerSettings, Budget):
    """Denoising steps that reuse what earlier ones computed."""

    decision: ClassVar[type[Decision]] = CacheDecision

    cache_interval: int = setting(
        5,
        text="Denoising steps from one recomputation to the next.",
        read=whole_from(1, DIFFUSION_STEPS),
        off=1,
    )
    """Denoising steps between two recomputations of the DiT's blocks (the paper's N); 1 recomputes always. It decides
    nothing where `cache_steps` is given, nor with a solver other than DDIM, of which every step computes."""
    cache_steps: int | tuple[int, ...] | None = setting(
        None,
        text="Denoising steps that compute, in place of an interval.",
        read=_read_steps,
        off=None,
        parse=_parse_steps,
        metavar="N|i,j,k|uniform",
        forms="a count as in 3, steps as in 0,3,7, or uniform for those of --cache-interval",
    )
    """Denoising steps at which the DiT's blocks compute, not in the paper: ascending steps from 0; their number, for
    calibration to choose the best of all sets; None for every `cache_interval`-th."""
    cache_extrapolate: bool = setting(
        False, text="Extrapolate what is reused from the last two computed steps.", read=true_or_false, off=False
    )
    """Whether a reused step extrapolates linearly from the last two computed ones, not in the paper; else it reuses
    the last one as it is."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steps, of = self.cache_steps, self.denoising_steps
        if self.solver != "ddim" and (steps is not None or self.cache_extrapolate):
            raise ValueError(
                f"cache_steps={steps}, cache_extrapolate={self.cache_extrapolate} with solver={self.solver!r}, which"
                f" computes each of its {of} steps: a step less is better than a step that reuses; give solver='ddim',"
                " or fewer steps of the solver"
            )
        if steps is not None and (steps[-1] if isinstance(steps, tuple) else steps - 1) >= of:
            raise ValueError(
                f"cache_steps={steps}: the sampler takes {of} steps (ddim_steps={self.ddim_steps}); name some of 0 to"
                f" {of - 1}, or give their number, up to {of}"
            )
        if self.cache_candidates > MOST_SETS:
            raise ValueError(
                f"cache_steps={steps} of {of} steps (ddim_steps={self.ddim_steps}): calibration would have to try"
                f" {self.cache_candidates:,} sets of steps, and it tries {MOST_SETS} at most; name the steps, as"
                f" in cache_steps={self.computed_steps()}, or take fewer denoising steps"
            )

    @property
    def planned(self) -> bool:
        """Whether calibration has chosen, so that the decision is the plan's."""
        return self.searched_steps > 0

    @property
    def searched_steps(self) -> int:
        """How many steps calibration has to choose; 0 where the settings tell all, or nothing is left to choose."""
        number = self.cache_steps if isinstance(self.cache_steps, int) else 0
        return number if 1 < number < self.denoising_steps else 0

    @property
    def cache_candidates(self) -> int:
        """Sets of steps that calibration has to try."""
        return comb(self.denoising_steps - 1, self.searched_steps - 1) if self.searched_steps else 0

    def computed_steps(self) -> tuple[int, ...]:
        """Return the steps that compute: those named, those of the interval, or as many as asked for, spread evenly."""
        of, steps = self.denoising_steps, self.cache_steps
        if isinstance(steps, tuple):
            return steps
        if self.solver != "ddim":
            return tuple(range(of))
        if steps is None:
            return tuple(range(0, of, self.cache_interval))
        return tuple(place * of // steps for place in range(steps))

    def idle_settings(self) -> Mapping[str, str]:
        """Return the interval beside named steps, and the extrapolation where it applies to no step."""
        if self.solver != "ddim":
            reason = f"solver={self.solver!r} computes every step; give --solver ddim"
            return dict.fromkeys(("cache_interval", "cache_extrapolate"), reason)
        found = {}
        if self.cache_steps is not None:
            found["cache_interval"] = (
                f"cache_steps={self.cache_steps} says which steps compute; give --cache-steps uniform"
            )
        computed = self.computed_steps()
        behind = range(computed[1] if len(computed) > 1 else self.denoising_steps, self.denoising_steps)
        if not self.searched_steps and set(behind) <= set(computed):
            found["cache_extrapolate"] = "no step is reused behind two computed ones; give --cache-steps, as in 0,3,7"
        return found

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the number of steps that calibration has to choose."""
        del sizes
        return {"cache_steps": self.cache_steps} if self.searched_steps else {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return what the search compares sets of steps by."""
        del sizes
        return frozenset({"cache_shift"}) if self.searched_steps else frozenset()

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the steps that compute; where nothing was measured, evenly spread ones in place of searched ones."""
        del sizes, earlier
        steps, of = self.computed_steps(), self.denoising_steps
        if self.searched_steps and measured is not None and measured.cache_shift is not None:
            steps = min(candidates(self.searched_steps, of), key=measured.cache_shift)
        searched = self.searched_steps > 0
        return (CacheDecision(steps=steps, of=of, extrapolate=self.cache_extrapolate, searched=searched),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse steps that were searched for other settings, or not at all; see `Budget.check_decision`."""
        del sizes, measured
        if not self.searched_steps:
            return
        found, of, extrapolate = decision_of(CacheDecision, decisions), self.denoising_steps, self.cache_extrapolate
        if (len(found.steps), found.of, found.extrapolate) != (self.searched_steps, of, extrapolate):
            searched = (
                f"computes the denoising steps {found.steps} of {found.of} (cache_extrapolate={found.extrapolate})"
                if found.searched
                else "has no searched denoising steps"
            )
            raise CalibrationError(
                f"the plan {searched}, the settings ask for cache_steps={self.cache_steps} of {of}"
                f" (cache_extrapolate={extrapolate}): calibrate with these settings, or name the steps"
            )


def candidates(number: int, of: int) -> Iterator[tuple[int, ...]]:
    """Yield all sets of `number` steps of `of` that begin with 0, in lexicographic order."""
    for others in combinations(range(1, of), number - 1):
        yield (0, *others)
