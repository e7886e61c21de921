"""`stand_in_plan`: right counts, nothing measured; plans that were measured are in test_calibration."""

from dataclasses import replace

import pytest

from evla_compile.config import CompileConfig
from evla_compile.model.policy import ModelSizes
from evla_compile.pipeline import check_plan
from evla_compile.plan import stand_in_plan


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
