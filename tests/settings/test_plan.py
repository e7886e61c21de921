"""Plans: `stand_in_plan`, and what is read of their JSON; plans that were measured are in test_calibration."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.cache import CacheDecision
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.mlp import MLPDecision
from evla_compile.settings.budgets.repair import RepairDecision
from evla_compile.settings.budgets.sampler import SamplerDecision
from evla_compile.settings.budgets.vision import VisionDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import PLAN_FORMAT, Plan, check_plan, stand_in_plan
from evla_compile.settings.sizes import ModelSizes


@pytest.fixture
def sizes(small_sizes: ModelSizes) -> ModelSizes:
    """Sizes whose MLP is wide enough to be cut."""
    return replace(small_sizes, language=replace(small_sizes.language, mlp_width=256))


def test_a_stand_in_keeps_the_first_layers_and_neurons(sizes: ModelSizes) -> None:
    config = CompileConfig(keep_layers=3, mlp_keep=0.75, visual_tokens=None)
    plan = stand_in_plan(sizes, config)
    check_plan(plan, config, sizes)
    assert plan.keep_layers == (0, 1, 2)
    assert plan.mlp_neurons == (tuple(range(192)),) * 3
    assert (plan.layer_importance, plan.frames) == ((), 0)


def test_a_stand_in_keeps_the_layers_that_are_named(sizes: ModelSizes) -> None:
    plan = stand_in_plan(sizes, CompileConfig(keep_layers=(0, 3), mlp_keep=1.0, visual_tokens=None))
    assert (plan.keep_layers, plan.mlp_neurons) == ((0, 3), ())


def test_a_stand_in_for_a_dense_configuration_keeps_everything(sizes: ModelSizes) -> None:
    plan = stand_in_plan(sizes, CompileConfig.dense())
    assert (plan.keep_layers, plan.mlp_neurons) == ((0, 1, 2, 3), ())


def test_a_budget_that_the_policy_lacks_is_refused(sizes: ModelSizes) -> None:
    with pytest.raises(ValueError, match="keep_layers=22: the decoder has 4 layers"):
        stand_in_plan(sizes, CompileConfig(keep_layers=22))


PLAN = Plan(
    decisions=(
        LayerDecision(keep=(0, 1), importance=(0.25, 1.0, 0.0), rule="greedy"),
        MLPDecision(neurons=((0, (0, 1, 5)), (1, (2, 3, 4)))),
    ),
    ranges=(("projector.projector.0", 3.0),),
    frames=2,
    frames_digest="0123456789abcdef",
    checkpoint=(("llm_backbone", "fedcba9876543210"), ("projector", "00000000ffffffff")),
)


def test_a_plan_survives_json(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    found = Plan.load(tmp_path / "plan.json")
    assert found == PLAN
    assert hash(found) == hash(PLAN)


def test_a_plan_is_written_as_every_version_has_written_it(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_text() == (
        '{"format": 1, "layer_importance": [0.25, 1.0, 0.0], "keep_layers": [0, 1], "mlp_neurons": ["0-1,5", "2-4"],'
        ' "ranges": {"projector.projector.0": 3.0}, "frames": 2, "frames_digest": "0123456789abcdef",'
        ' "layer_rule": "greedy",'
        ' "checkpoint": {"llm_backbone": "fedcba9876543210", "projector": "00000000ffffffff"}}\n'
    )


def test_a_plan_reads_as_it_was_decided() -> None:
    assert (PLAN.keep_layers, PLAN.layer_importance, PLAN.layer_rule) == ((0, 1), (0.25, 1.0, 0.0), "greedy")
    assert PLAN.mlp_neurons == ((0, 1, 5), (2, 3, 4))


def test_a_technique_without_a_decision_keeps_everything() -> None:
    layers, neurons, *others = PLAN.decisions
    assert others == [VisionDecision(), RepairDecision(), SamplerDecision(), CacheDecision()]
    assert Plan(decisions=(layers,)).decisions == (layers, MLPDecision(), *others)
    assert Plan(decisions=(*others, neurons, layers)).decisions == PLAN.decisions


def test_whole_numbers_of_json_are_numbers() -> None:
    found = Plan.from_json(PLAN.to_json() | {"layer_importance": [0.25, 1, 0], "ranges": {"projector.projector.0": 3}})
    assert found == PLAN
    assert all(isinstance(value, float) for value in (*found.layer_importance, found.ranges[0][1]))


def test_fields_that_an_older_format_lacks_have_defaults() -> None:
    needed = ("format", "layer_importance", "keep_layers", "mlp_neurons", "frames")
    found = Plan.from_json({name: value for name, value in PLAN.to_json().items() if name in needed})
    layers, *others = PLAN.decisions
    assert isinstance(layers, LayerDecision)
    decisions = (replace(layers, rule=None), *others)
    assert found == replace(PLAN, decisions=decisions, ranges=(), frames_digest=None, checkpoint=())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": PLAN_FORMAT + 1}, f"format {PLAN_FORMAT + 1}, and this version of evla_compile reads up to"),
        ({"format": 10**60}, "update evla_compile, or calibrate again"),
        ({"format": "1"}, "'format' is '1', expected a whole number from 1"),
        ({"format": True}, "'format' is True, expected a whole number from 1"),
        ({"format": 0}, "'format' is 0, expected a whole number from 1"),
        ({"format": None}, "from before plans had a format; calibrate again"),
        ({"extra": 1}, f"a plan of format {PLAN_FORMAT} has no keys \\[\"'extra'\"\\]"),
        ({"keep_layers": [0, -1]}, "-1: expected a whole number from 0 up"),
        ({"keep_layers": [0.5]}, "0.5: expected a whole number from 0 up"),
        ({"mlp_neurons": [3, 3]}, "3: expected runs of neurons"),
        ({"mlp_neurons": ["3-", "0-2"]}, "'3-': expected runs of neurons"),
        ({"mlp_neurons": ["3,1", "0-2"]}, "in ascending order"),
        ({"mlp_neurons": ["0-2"]}, "neurons of 1 layers for 2 kept layers"),
        ({"mlp_neurons": [",".join(["0-999999"] * 50), "0-2"]}, "neurons in a layer: expected at most"),
        ({"layer_importance": [True, 0.5]}, "importance True: expected a finite number"),
        ({"layer_importance": [10**400]}, "importance 10+: expected a finite number"),
        ({"layer_importance": [float("nan")]}, "importance nan: expected a finite number"),
        ({"layer_importance": ["0.5"]}, "importance '0.5': expected a finite number"),
        ({"ranges": {"a": float("inf")}}, "importance inf: expected a finite number"),
        ({"ranges": [1]}, "expected an object of numbers"),
        ({"frames": True}, "True: expected a whole number from 0 up"),
        ({"frames_digest": "0123"}, "digest '0123': expected 16 hexadecimal digits"),
        ({"layer_rule": "random"}, "layer_rule 'random': expected one of importance, greedy, or null"),
        ({"layer_rule": []}, "layer_rule \\[\\]: expected one of"),
        ({"checkpoint": {"llm_backbone": 3}}, "digest 3: expected 16 hexadecimal digits"),
        ({"checkpoint": {"\x1b[2J": "0123456789abcdef"}}, "expected digests by group"),
        ({"checkpoint": []}, "expected digests by group"),
        (
            {"cache_steps": [0, 3]},
            r"cache_steps \(0, 3\) of 0, cache_extrapolate False: .* to below 0",
        ),
        (
            {"cache_steps": [0, 3], "cache_of_steps": 3},
            r"\(0, 3\) of 3, .*: expected steps from 0 to below 3",
        ),
        ({"cache_steps": [0, 3], "cache_of_steps": 101}, "of 101, .*, a sampler of at most 100 steps"),
        ({"cache_steps": [1, 3], "cache_of_steps": 10}, r"cache_steps \(1, 3\) of 10"),
        ({"cache_steps": [0, 3, 3], "cache_of_steps": 10}, "in ascending order"),
        ({"cache_steps": [0, True], "cache_of_steps": 10}, "True: expected a whole number from 0 up"),
        ({"cache_steps": list(range(101)), "cache_of_steps": 100}, "101 cache steps: expected at most 100"),
        ({"cache_steps": [0], "cache_of_steps": 10, "cache_extrapolate": 1}, "cache_extrapolate 1: .*true or false"),
        ({"solver_timesteps": [90, 45]}, "ddim_steps=0 has no integer stride"),
        ({"solver_timesteps": [45, 90], "solver_ddim_steps": 10}, r"solver_timesteps=\[45, 90\]: expected descending"),
        ({"solver_timesteps": [90, True], "solver_ddim_steps": 10}, "True: expected a whole number from 0 up"),
        ({"solver_timesteps": [], "solver_ddim_steps": 10}, r"solver_timesteps=\[\]: expected descending"),
        ({"solver_timesteps": 90, "solver_ddim_steps": 10}, "malformed plan: 'int' object is not iterable"),
        ({"cache_steps": 3, "cache_of_steps": 10}, "malformed plan: object of type 'int' has no len"),
    ],
)
def test_a_malformed_plan_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(PLAN.to_json() | change))
    with pytest.raises(CalibrationError, match=message):
        Plan.load(tmp_path / "plan.json")


@pytest.mark.parametrize("missing", ["layer_importance", "keep_layers", "mlp_neurons", "frames"])
def test_a_plan_without_what_every_plan_has_is_refused(missing: str) -> None:
    data = PLAN.to_json()
    del data[missing]
    with pytest.raises(CalibrationError, match=f"needs \\['{missing}'\\]"):
        Plan.from_json(data)


@pytest.mark.parametrize("data", [None, [], "plan", 3])
def test_what_is_no_object_is_no_plan(data: object) -> None:
    with pytest.raises(CalibrationError, match="a plan is a JSON object with the keys"):
        Plan.from_json(data)
