"""How many neurons of the vision towers stay; what a plan holds of them; refusals."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import Measured, decision_of
from evla_compile.settings.budgets.repair import compressed
from evla_compile.settings.budgets.vision import CutBlock, VisionDecision
from evla_compile.settings.config import PRESETS, CompileConfig
from evla_compile.settings.plan import Plan, check_plan, plan_without_calibration, planned, stand_in_plan
from evla_compile.settings.sizes import published_sizes

SIZES = published_sizes("base")
DENSE = CompileConfig.dense()
QUARTER = replace(DENSE, vision_mlp_keep=0.25)
DINO, SIGLIP = "vision_backbone.dino_featurizer", "vision_backbone.siglip_featurizer"


def vision_of(plan: Plan) -> VisionDecision:
    return decision_of(VisionDecision, plan.decisions)


@pytest.mark.parametrize(
    ("share", "kept"),
    [(1.0, {}), (0.25, {DINO: 1024, SIGLIP: 1088}), (0.001, {DINO: 64, SIGLIP: 64}), (0.999, {SIGLIP: 4288})],
)
def test_counts_are_multiples_of_64_in_each_tower(share: float, kept: dict[str, int]) -> None:
    assert replace(DENSE, vision_mlp_keep=share).kept_vision_neurons(SIZES) == kept


def test_one_preset_cuts_the_towers_and_the_cut_is_measured() -> None:
    assert [name for name, config in PRESETS.items() if config.vision_mlp_keep < 1.0] == ["fast"]
    assert DENSE.measurements(SIZES).isdisjoint({"vision"})
    assert "vision" in QUARTER.measurements(SIZES)
    assert QUARTER.unmeasured(SIZES) == {"vision_mlp_keep": 0.25}
    with pytest.raises(CalibrationError, match=r"vision_mlp_keep=0\.25 has to be measured"):
        plan_without_calibration(SIZES, QUARTER)


@pytest.mark.parametrize("share", [0.0, 1.1, "a", True, None])
def test_shares_out_of_range_are_refused(share: Any) -> None:
    with pytest.raises(ValueError, match=r"vision_mlp_keep="):
        CompileConfig(vision_mlp_keep=share)


def test_a_stand_in_cuts_every_block_and_counts_as_compression() -> None:
    decisions = QUARTER.decide(SIZES, None)
    blocks = decision_of(VisionDecision, decisions).blocks
    assert len(blocks) == SIZES.dino.depth + SIZES.siglip.depth - 2
    assert {len(block.neurons) for block in blocks} == {1024, 1088}
    assert compressed(decisions, SIZES)
    assert not compressed(DENSE.decide(SIZES, None), SIZES)


def test_frames_of_a_repair_count_where_the_towers_are_cut() -> None:
    assert "repair_frames" in DENSE.idle_settings()
    assert "repair_frames" not in QUARTER.idle_settings()


def test_calibration_is_asked_with_the_counts_and_its_decision_survives_json() -> None:
    asked = []

    def cut(counts: Any) -> VisionDecision:
        asked.append(dict(counts))
        whole = decision_of(VisionDecision, QUARTER.decide(SIZES, None))
        first = replace(whole.blocks[0], neurons=tuple(range(0, 2048, 2)), rho=0.01, moved=(0.2, 0.01))
        return VisionDecision(blocks=(first, *whole.blocks[1:]))

    decisions = QUARTER.decide(SIZES, Measured(layer_importance=tuple(np.ones(32)), vision=cut))
    assert asked == [{DINO: 1024, SIGLIP: 1088}]
    plan = Plan(decisions=planned(decisions), frames=1)
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert vision_of(again).refit == (f"{DINO}.blocks.0",)
    check_plan(again, QUARTER, SIZES)


def test_a_plan_without_a_cut_is_written_as_before() -> None:
    assert "vision" not in stand_in_plan(SIZES, DENSE).to_json()


BLOCK = {"path": f"{DINO}.blocks.0", "neurons": "0-63", "rho": 0.0, "moved": [0.0, 0.0]}


@pytest.mark.parametrize(
    "vision",
    [
        {},
        [],
        "a",
        [BLOCK] * 513,
        [BLOCK | {"more": 1}],
        [{"path": "a"}],
        [BLOCK | {"path": "../a.0"}],
        [BLOCK | {"path": 3}],
        [BLOCK | {"neurons": "5,3"}],
        [BLOCK | {"neurons": [1, 2]}],
        [BLOCK | {"rho": -1.0}],
        [BLOCK | {"rho": "1"}],
        [BLOCK | {"moved": [1.0]}],
        [BLOCK | {"moved": [float("nan"), 0.0]}],
        [BLOCK | {"moved": 1.0}],
    ],
)
def test_malformed_cuts_are_refused(vision: Any) -> None:
    data = stand_in_plan(SIZES, DENSE).to_json() | {"vision": vision}
    with pytest.raises(CalibrationError, match="malformed plan"):
        Plan.from_json(data)


def test_plans_of_other_cuts_are_refused() -> None:
    plan = stand_in_plan(SIZES, QUARTER)
    with pytest.raises(CalibrationError, match=r"\[1024, 1088\] neurons in 49 vision blocks, .* ask for all in 0"):
        check_plan(plan, DENSE, SIZES)
    with pytest.raises(CalibrationError, match=r"vision_mlp_keep=0\.5"):
        check_plan(plan, replace(DENSE, vision_mlp_keep=0.5), SIZES)
    blocks = vision_of(plan).blocks

    def with_first(block: CutBlock) -> Plan:
        others = tuple(each for each in plan.decisions if not isinstance(each, VisionDecision))
        return Plan(decisions=(*others, VisionDecision(blocks=(block, *blocks[1:]))))

    for neurons, message in (
        ((*range(1, 1024), 4096), "beyond those of"),
        ((1, 0, *range(2, 1024)), "the plan's neurons of"),
    ):
        with pytest.raises(CalibrationError, match=message):
            check_plan(with_first(replace(blocks[0], neurons=neurons)), QUARTER, SIZES)
    with pytest.raises(CalibrationError, match=r"in 49 vision blocks"):
        check_plan(with_first(replace(blocks[1])), QUARTER, SIZES)
