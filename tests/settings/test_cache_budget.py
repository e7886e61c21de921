"""Which denoising steps compute: by interval, named, or searched; what a plan holds of them; refusals."""

import json
import re
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import Measured
from evla_compile.settings.budgets.cache import CacheDecision, candidates
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.sampler import MOST_SETS
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, check_plan, plan_without_calibration, planned, stand_in_plan
from evla_compile.settings.sizes import published_sizes

SIZES = published_sizes("base")
DENSE = CompileConfig.dense()
SEARCHED = replace(DENSE, cache_steps=3, cache_extrapolate=True)


def cache_of(config: CompileConfig, measured: Measured | None = None) -> CacheDecision:
    (found,) = (each for each in config.decide(SIZES, measured) if isinstance(each, CacheDecision))
    return found


def plan_of(config: CompileConfig, measured: Measured) -> Plan:
    return Plan(decisions=planned(config.decide(SIZES, measured)), frames=1)


def completed(config: CompileConfig, plan: Plan) -> CacheDecision:
    check_plan(plan, config, SIZES)
    (found,) = (each for each in config.complete(plan.decisions, SIZES) if isinstance(each, CacheDecision))
    return found


@pytest.mark.parametrize(
    ("settings", "steps"),
    [
        ({"cache_interval": 1}, tuple(range(10))),
        ({"cache_interval": 4}, (0, 4, 8)),
        ({"cache_interval": 5}, (0, 5)),
        ({"cache_interval": 100}, (0,)),
        ({"cache_interval": 2, "cache_steps": (0, 3, 7)}, (0, 3, 7)),
        ({"cache_steps": [0, 6]}, (0, 6)),
        ({"cache_steps": np.array([0, 9])}, (0, 9)),
        ({"cache_steps": range(0, 10, 3)}, (0, 3, 6, 9)),
        ({"cache_steps": 1}, (0,)),
        ({"cache_steps": np.int64(10)}, tuple(range(10))),
        ({"cache_steps": (0, 1), "ddim_steps": 2}, (0, 1)),
    ],
)
def test_steps_follow_from_the_settings_and_stay_out_of_the_plan(
    settings: dict[str, Any], steps: tuple[int, ...]
) -> None:
    config = replace(DENSE, **settings)
    found = cache_of(config)
    assert found == CacheDecision(steps=steps, of=config.ddim_steps)
    assert found.idle(SIZES) == (len(steps) == config.ddim_steps)
    plan = plan_without_calibration(SIZES, config)
    assert plan == plan_without_calibration(SIZES, DENSE)
    assert "cache" not in str(plan.to_json())
    assert completed(config, plan) == found
    assert CompileConfig.from_json(config.to_json()) == config


def test_searched_steps_are_those_that_shift_least_the_first_among_equals() -> None:
    asked: list[tuple[int, ...]] = []

    def shift(steps: tuple[int, ...]) -> float:
        asked.append(steps)
        return 0.5 if steps in ((0, 3, 7), (0, 4, 8)) else 1.0

    found = cache_of(SEARCHED, Measured(cache_shift=shift))
    assert found == CacheDecision(steps=(0, 3, 7), of=10, extrapolate=True, searched=True)
    assert asked == [(0, first, second) for first, second in combinations(range(1, 10), 2)]


def test_a_plan_holds_searched_steps_and_what_they_were_searched_for() -> None:
    plan = plan_of(SEARCHED, Measured(cache_shift=lambda steps: -sum(steps)))
    data = plan.to_json()
    assert list(data.items())[-3:] == [("cache_extrapolate", True), ("cache_of_steps", 10), ("cache_steps", (0, 8, 9))]
    assert Plan.from_json(json.loads(json.dumps(data))) == plan
    assert completed(SEARCHED, plan).steps == (0, 8, 9)


def test_named_steps_and_intervals_take_any_plan() -> None:
    plan = plan_of(SEARCHED, Measured(cache_shift=lambda steps: -sum(steps)))
    for settings in ({"cache_steps": (0, 2)}, {"cache_interval": 5}, {"cache_steps": 10}, {"ddim_steps": 5}):
        config = replace(DENSE, **settings)
        assert completed(config, plan) == cache_of(config)


def test_evenly_spread_steps_stand_in_for_searched_ones() -> None:
    for number in range(2, 10):
        config = replace(DENSE, cache_steps=number)
        found = completed(config, stand_in_plan(SIZES, config))
        assert found == cache_of(config)
        assert len(found.steps) == number
        assert found.steps[0] == 0
        assert max(np.diff((*found.steps, 10))) - min(np.diff((*found.steps, 10))) <= 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_steps": 4}, "the plan computes the denoising steps (0, 1, 2) of 10 (cache_extrapolate=True), the"
         " settings ask for cache_steps=4 of 10 (cache_extrapolate=True): calibrate with these settings, or name"),
        ({"cache_extrapolate": False}, "ask for cache_steps=3 of 10 (cache_extrapolate=False)"),
        ({"ddim_steps": 5}, "ask for cache_steps=3 of 5"),
    ],
)  # fmt: skip
def test_a_plan_searched_for_other_settings_is_refused(settings: dict[str, Any], message: str) -> None:
    plan = plan_of(SEARCHED, Measured(cache_shift=sum))
    with pytest.raises(CalibrationError, match=re.escape(message)):
        check_plan(plan, replace(SEARCHED, **settings), SIZES)


def test_a_plan_without_a_search_is_refused_where_steps_are_to_be_searched() -> None:
    plan = Plan(decisions=(LayerDecision(keep=tuple(range(32))),), frames=3)
    with pytest.raises(CalibrationError, match="the plan has no searched denoising steps, the settings ask for cache_"):
        check_plan(plan, SEARCHED, SIZES)
    with pytest.raises(CalibrationError, match=r"for cache_steps=3 has to be measured: give calibration= frames"):
        plan_without_calibration(SIZES, SEARCHED)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_steps": 0}, "cache_steps=0: expected the denoising steps that compute, as (0, 3, 7), their number,"
         " from 1 to 100, or None"),
        ({"cache_steps": True}, "cache_steps=True: expected the denoising steps"),
        ({"cache_steps": 0.5}, "cache_steps=0.5: expected the denoising steps"),
        ({"cache_steps": "0,3"}, "cache_steps='0,3': expected the denoising steps"),
        ({"cache_steps": ()}, "cache_steps=(): expected the denoising steps"),
        ({"cache_steps": (0, 3.0)}, "cache_steps=(0, 3.0): expected the denoising steps"),
        ({"cache_steps": (1, 3)}, "cache_steps=(1, 3): steps must begin with 0, which has none to reuse, and ascend"),
        ({"cache_steps": (0, 3, 3)}, "cache_steps=(0, 3, 3): steps must begin with 0"),
        ({"cache_steps": (0, 3, 10)}, "cache_steps=(0, 3, 10): the sampler takes 10 steps (ddim_steps=10); name some of"
         " 0 to 9, or give their number, up to 10"),
        ({"cache_steps": 6, "ddim_steps": 5}, "cache_steps=6: the sampler takes 5 steps"),
        ({"cache_steps": 3, "ddim_steps": 100}, "cache_steps=3 of 100 steps (ddim_steps=100): calibration would have to"
         " try 4,851 sets of steps, and it tries 500 at most; name the steps, as in cache_steps=(0, 33, 66), or take"),
        ({"cache_extrapolate": 1}, "cache_extrapolate=1: expected True or False"),
        ({"cache_extrapolate": None}, "cache_extrapolate=None: expected True or False"),
    ],
)  # fmt: skip
def test_what_are_no_steps_of_the_sampler_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(DENSE, **settings)


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"cache_extrapolate"}),
        ({"cache_interval": 5}, set()),
        ({"cache_interval": 10}, {"cache_extrapolate"}),
        ({"cache_interval": 9}, {"cache_extrapolate"}),  # only step 0 has steps behind it
        ({"cache_steps": (0, 5)}, {"cache_interval"}),
        ({"cache_steps": (0, 8, 9)}, {"cache_interval", "cache_extrapolate"}),
        ({"cache_steps": (0, 7, 9)}, {"cache_interval"}),
        ({"cache_steps": 2}, {"cache_interval"}),
        ({"cache_steps": 1}, {"cache_interval", "cache_extrapolate"}),
        ({"cache_steps": 10}, {"cache_interval", "cache_extrapolate"}),
    ],
)
def test_settings_that_decide_nothing_are_known(settings: dict[str, Any], idle: set[str]) -> None:
    config = replace(DENSE, **settings)
    assert {name for name in config.idle_settings() if name.startswith("cache")} == idle


def test_candidates_are_all_sets_that_begin_with_step_0() -> None:
    assert list(candidates(2, 4)) == [(0, 1), (0, 2), (0, 3)]
    assert len(list(candidates(6, 12))) <= MOST_SETS
    assert replace(DENSE, cache_steps=6, ddim_steps=12).searched_steps == 6
