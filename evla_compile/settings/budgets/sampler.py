"""The sampler: DDIM as the policy is evaluated, or a solver that needs fewer network evaluations; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import (
    Budget,
    Decision,
    Measured,
    MeasuredDecision,
    Measurement,
    decision_of,
)
from evla_compile.settings.budgets.plan_values import index
from evla_compile.settings.schedule import DDIM_STEPS, check_ddim_steps, check_timesteps, ddim_timesteps
from evla_compile.settings.setting import Settings, one_of, setting, whole_from
from evla_compile.settings.sizes import ModelSizes

Solver: TypeAlias = Literal["ddim", "dpm++"]
"""What the compiled policy denoises with: CogACT's DDIM, or DPM-Solver++(2M)."""

SOLVERS: tuple[Solver, ...] = get_args(Solver)
"""All values of `Solver`."""

MOST_SETS = 500
"""Sets of timesteps, or of steps, that a search tries at most."""

MOST_SOLVER_STEPS = 8
"""Solver steps that a search places at most: as many as the grid has room for at any `ddim_steps`."""

_STRIDES = (5, 10)  # of the grid that timesteps are searched on; 5 is in it at either


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerDecision(MeasuredDecision):
    """The solver's timesteps; a plan holds those that were searched, the settings tell all others."""

    keys: ClassVar[Mapping[str, Any]] = {"solver_timesteps": (), "solver_ddim_steps": 0}

    timesteps: tuple[int, ...] = ()
    """Timesteps of DPM-Solver++(2M), descending; empty for DDIM."""
    ddim_steps: int = 0
    """Steps of the DDIM that searched timesteps were compared with; 0 where none were searched."""

    @property
    def in_plan(self) -> bool:
        """Whether calibration chose the timesteps: what the settings name is in the settings."""
        return self.ddim_steps > 0

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether the sampler is DDIM."""
        del sizes
        return not self.timesteps

    def to_json(self) -> dict[str, Any]:
        """Return searched timesteps and what they were compared with; nothing where there are none."""
        if not self.in_plan:
            return {}
        return {"solver_timesteps": self.timesteps, "solver_ddim_steps": self.ddim_steps}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        del earlier
        timesteps, ddim_steps = data["solver_timesteps"], index(data["solver_ddim_steps"])
        if timesteps in ((), []) and not ddim_steps:
            return cls()
        return cls(
            timesteps=check_timesteps("solver_timesteps", [index(timestep) for timestep in timesteps]),
            ddim_steps=check_ddim_steps(ddim_steps),
        )


@dataclass(frozen=True, kw_only=True)
class DenoisingSettings(Settings):
    """The steps of DDIM, which the dense policy takes whatever solver the compiled one has."""

    ddim_steps: int = setting(DDIM_STEPS, text="Denoising steps.", read=lambda _, steps: check_ddim_steps(steps))
    """Denoising steps of the DDIM sampler (eta 0); only counts that an integer stride over 100 yields. With another
    solver it is the sampler that deviations are measured from."""


def _read_solver_steps(name: str, steps: Any) -> int | None:
    return None if steps is None else whole_from(1, MOST_SOLVER_STEPS)(name, steps)


def _read_timesteps(name: str, timesteps: Any) -> tuple[int, ...] | None:
    return None if timesteps is None else check_timesteps(name, timesteps)


def _parse_timesteps(text: str) -> tuple[int, ...]:
    return tuple(int(timestep) for timestep in text.removesuffix(",").split(","))


@dataclass(frozen=True, kw_only=True)
class SamplerSettings(DenoisingSettings):
    """What a budget of the action head has to know of the sampler."""

    solver: Solver = setting(
        "ddim", text="Sampler: CogACT's, or DPM-Solver++ of second order.", read=one_of(SOLVERS), off="ddim"
    )
    """Sampler of the compiled policy: "ddim", CogACT's with `ddim_steps`; or "dpm++", DPM-Solver++(2M), not in the
    paper, which needs either `solver_steps` or `solver_timesteps`."""
    solver_steps: int | None = setting(
        None, text="Steps of dpm++, for calibration to place.", read=_read_solver_steps, off=None
    )
    """Steps of "dpm++", from 1 to 8: calibration chooses the timesteps on a grid; the first is that of DDIM."""
    solver_timesteps: tuple[int, ...] | None = setting(
        None,
        text="Timesteps of dpm++, descending.",
        read=_read_timesteps,
        off=None,
        parse=_parse_timesteps,
        metavar="i,j,k",
        forms="descending timesteps from 99 to 0, as in 90,45,10",
    )
    """Timesteps of "dpm++" on the training schedule, descending, such as (90, 45, 10). Actions are sensitive to the
    last one; 0 is a bad choice."""

    def __post_init__(self) -> None:
        super().__post_init__()
        given = {"solver_steps": self.solver_steps, "solver_timesteps": self.solver_timesteps}
        given = {name: value for name, value in given.items() if value is not None}
        if self.solver == "ddim" and given:
            settings = " and ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(f"{settings} with solver='ddim', which takes ddim_steps; give solver='dpm++' too")
        if self.solver == "dpm++" and len(given) != 1:
            raise ValueError(
                f"solver='dpm++' with solver_steps={self.solver_steps} and solver_timesteps={self.solver_timesteps}:"
                " give one of them, solver_steps=3 for calibration to choose the timesteps, or"
                " solver_timesteps=(90, 45, 10)"
            )

    @property
    def denoising_steps(self) -> int:
        """Denoising steps of the compiled sampler."""
        if self.solver == "ddim":
            return self.ddim_steps
        return self.solver_steps or len(self.solver_timesteps or ())


@dataclass(frozen=True, kw_only=True)
class SamplerBudget(SamplerSettings, Budget):
    """Network evaluations of the sampler."""

    decision: ClassVar[type[Decision]] = SamplerDecision

    @property
    def planned(self) -> bool:
        """Whether calibration has chosen, so that the decision is the plan's."""
        return self.searched_timesteps > 0

    @property
    def searched_timesteps(self) -> int:
        """How many timesteps calibration has to choose; 0 where the settings tell all, or nothing is left to choose."""
        return self.solver_steps if self.solver_steps is not None and self.solver_steps > 1 else 0

    def timestep_sets(self) -> tuple[tuple[int, ...], ...]:
        """Return the sets of timesteps that a search compares, descending each; see `timestep_grid`."""
        first, number = ddim_timesteps(self.ddim_steps)[0], self.solver_steps or 1
        return tuple((first, *others) for others in combinations(timestep_grid(first, number - 1), number - 1))

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the number of timesteps that calibration has to choose."""
        del sizes
        return {"solver_steps": self.solver_steps} if self.searched_timesteps else {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return what the search compares sets of timesteps by."""
        del sizes
        return frozenset({"solver_shift"}) if self.searched_timesteps else frozenset()

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the timesteps; where nothing was measured, evenly spread ones in place of searched ones."""
        del sizes, earlier
        number = self.solver_steps
        if number is None:
            return (SamplerDecision(timesteps=self.solver_timesteps or ()),)
        first = ddim_timesteps(self.ddim_steps)[0]
        timesteps = tuple(first - first * place // number for place in range(number))
        if self.searched_timesteps and measured is not None and measured.solver_shift is not None:
            timesteps = min(self.timestep_sets(), key=measured.solver_shift)
        return (SamplerDecision(timesteps=timesteps, ddim_steps=self.ddim_steps if self.searched_timesteps else 0),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse timesteps that were searched for other settings, or not at all; see `Budget.check_decision`."""
        del sizes, measured
        if not self.searched_timesteps:
            return
        found = decision_of(SamplerDecision, decisions)
        if (len(found.timesteps), found.ddim_steps) != (self.solver_steps, self.ddim_steps):
            searched = (
                f"has the solver's timesteps {found.timesteps}, compared with {found.ddim_steps} steps of DDIM"
                if found.in_plan
                else "has no searched timesteps of the solver"
            )
            raise CalibrationError(
                f"the plan {searched}, the settings ask for solver_steps={self.solver_steps} with"
                f" ddim_steps={self.ddim_steps}: calibrate with these settings, or name the timesteps"
            )


def timestep_grid(first: int, number: int) -> tuple[int, ...]:
    """Return the timesteps below `first` that a search takes `number` of, descending.

    The multiples of 5, as long as `MOST_SETS` sets can be taken of them at most; else 5 and the multiples of 10.
    """
    grids = [sorted({5, *range(stride, first, stride)}, reverse=True) for stride in _STRIDES]
    return tuple(next((grid for grid in grids if 1 <= comb(len(grid), number) <= MOST_SETS), grids[-1]))
