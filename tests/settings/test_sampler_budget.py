"""The sampler's settings: timesteps named or searched; what a plan holds of them; refusals."""

import json
import re
from dataclasses import replace
from itertools import combinations
from math import comb
from typing import Any

import numpy as np
import pytest

from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import Measured, decision_of
from evla_compile.settings.budgets.cache import CacheDecision
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.sampler import MOST_SETS, MOST_SOLVER_STEPS, SamplerDecision, timestep_grid
from evla_compile.settings.config import PRESETS, CompileConfig
from evla_compile.settings.plan import Plan, check_plan, plan_without_calibration, planned, stand_in_plan
from evla_compile.settings.schedule import VALID_DDIM_STEPS, ddim_timesteps
from evla_compile.settings.sizes import published_sizes

SIZES = published_sizes("base")
DENSE = CompileConfig.dense()
NAMED = replace(DENSE, solver="dpm++", solver_timesteps=(90, 45, 10))
SEARCHED = replace(DENSE, solver="dpm++", solver_steps=3)


def completed(config: CompileConfig, plan: Plan) -> SamplerDecision:
    check_plan(plan, config, SIZES)
    return decision_of(SamplerDecision, config.complete(plan.decisions, SIZES))


def plan_of(config: CompileConfig, measured: Measured) -> Plan:
    return Plan(decisions=planned(config.decide(SIZES, measured)), frames=1)


@pytest.mark.parametrize(
    ("config", "timesteps", "steps"),
    [
        (DENSE, (), 10),
        (replace(DENSE, ddim_steps=5), (), 5),
        (NAMED, (90, 45, 10), 3),
        (replace(DENSE, solver="dpm++", solver_timesteps=(99, 0)), (99, 0), 2),
        (replace(DENSE, solver="dpm++", solver_steps=1), (90,), 1),  # there is one such set
    ],
)
def test_timesteps_that_are_told_stay_out_of_the_plan(
    config: CompileConfig, timesteps: tuple[int, ...], steps: int
) -> None:
    plan = plan_without_calibration(SIZES, config)
    assert plan == plan_without_calibration(SIZES, DENSE)
    assert "solver" not in str(plan.to_json())
    assert completed(config, plan) == SamplerDecision(timesteps=timesteps)
    assert completed(config, plan).idle(SIZES) == (config.solver == "ddim")
    assert config.denoising_steps == steps
    assert CompileConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


def test_searched_timesteps_are_those_that_shift_least() -> None:
    asked: list[tuple[int, ...]] = []

    def shift(timesteps: tuple[int, ...]) -> float:
        asked.append(timesteps)
        return 0.5 if timesteps in ((90, 50, 15), (90, 45, 15)) else 1.0

    found = decision_of(SamplerDecision, SEARCHED.decide(SIZES, Measured(solver_shift=shift)))
    assert found == SamplerDecision(timesteps=(90, 50, 15), ddim_steps=10)
    assert asked == [(90, *pair) for pair in combinations(range(85, 0, -5), 2)]


def test_a_plan_holds_searched_timesteps_and_the_ddim_they_were_compared_with() -> None:
    plan = plan_of(SEARCHED, Measured(solver_shift=sum))
    data = plan.to_json()
    assert list(data.items())[-2:] == [("solver_ddim_steps", 10), ("solver_timesteps", (90, 10, 5))]
    assert Plan.from_json(json.loads(json.dumps(data))) == plan
    assert completed(SEARCHED, plan).timesteps == (90, 10, 5)
    assert completed(NAMED, plan).timesteps == (90, 45, 10)
    assert completed(DENSE, plan).timesteps == ()


def test_evenly_spread_timesteps_stand_in_for_searched_ones() -> None:
    for number in range(2, MOST_SOLVER_STEPS + 1):
        config = replace(SEARCHED, solver_steps=number)
        found = completed(config, stand_in_plan(SIZES, config)).timesteps
        assert (len(found), found[0]) == (number, 90)
        assert max(np.diff(found)) - min(np.diff(found)) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver_steps": 4}, "has the solver's timesteps (90, 10, 5), compared with 10 steps of DDIM, the settings ask"
         " for solver_steps=4 with ddim_steps=10: calibrate with these settings, or name the timesteps"),
        ({"ddim_steps": 5}, "ask for solver_steps=3 with ddim_steps=5"),
    ],
)  # fmt: skip
def test_a_plan_searched_for_other_settings_is_refused(settings: dict[str, Any], message: str) -> None:
    plan = plan_of(SEARCHED, Measured(solver_shift=sum))
    with pytest.raises(CalibrationError, match=re.escape(message)):
        check_plan(plan, replace(SEARCHED, **settings), SIZES)


def test_a_plan_without_a_search_is_refused_where_timesteps_are_to_be_searched() -> None:
    plan = Plan(decisions=(LayerDecision(keep=tuple(range(32))),), frames=3)
    with pytest.raises(
        CalibrationError, match="the plan has no searched timesteps of the solver, the settings ask for"
    ):
        check_plan(plan, SEARCHED, SIZES)
    with pytest.raises(CalibrationError, match=r"for solver_steps=3 has to be measured: give calibration= frames"):
        plan_without_calibration(SIZES, SEARCHED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "euler"}, "solver='euler': expected one of ddim, dpm++"),
        ({"solver": "dpm++"}, "solver='dpm++' with solver_steps=None and solver_timesteps=None: give one of them"),
        ({"solver": "dpm++", "solver_steps": 2, "solver_timesteps": (90, 45)}, "give one of them, solver_steps=3"),
        ({"solver_steps": 3}, "solver_steps=3 with solver='ddim', which takes ddim_steps; give solver='dpm++' too"),
        ({"solver_timesteps": (90, 45)}, "solver_timesteps=(90, 45) with solver='ddim'"),
        ({"solver": "dpm++", "solver_steps": 9}, "solver_steps=9: expected a whole number from 1 to 8"),
        ({"solver": "dpm++", "solver_steps": True}, "solver_steps=True: expected a whole number from 1 to 8"),
        ({"solver": "dpm++", "solver_timesteps": (45, 90)}, "solver_timesteps=(45, 90): expected descending timesteps"),
        ({"solver": "dpm++", "solver_timesteps": (90, 10), "cache_steps": (0,)}, "cache_steps=(0,), cache_extrapolate="
         "False with solver='dpm++', which computes each of its 2 steps: a step less is better than a step that reuses;"
         " give solver='ddim', or fewer steps of the solver"),
        ({"solver": "dpm++", "solver_steps": 3, "cache_extrapolate": True}, "cache_steps=None, cache_extrapolate=True"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(DENSE, **settings)


def test_a_preset_s_interval_decides_nothing_beside_the_solver() -> None:
    config = replace(PRESETS["l22-t56"], solver="dpm++", solver_timesteps=(90, 45, 10))
    assert {"cache_interval", "cache_extrapolate"} <= config.idle_settings().keys()
    cache = decision_of(CacheDecision, config.decide(SIZES, None))
    assert cache.steps == (0, 1, 2)
    assert cache.idle(SIZES)


def test_the_grid_is_as_fine_as_the_number_of_sets_allows() -> None:
    assert timestep_grid(90, 2) == tuple(range(85, 0, -5))
    assert timestep_grid(90, 3) == (80, 70, 60, 50, 40, 30, 20, 10, 5)
    for ddim_steps in VALID_DDIM_STEPS:
        for number in range(1, MOST_SOLVER_STEPS + 1):
            first = ddim_timesteps(ddim_steps)[0]
            grid = timestep_grid(first, number - 1)
            assert 1 <= comb(len(grid), number - 1) <= MOST_SETS
            assert first > grid[0]
            config = replace(SEARCHED, ddim_steps=ddim_steps, solver_steps=number)
            assert len(set(config.timestep_sets())) == comb(len(grid), number - 1)
