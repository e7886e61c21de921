"""Budgets as counts and shares: the paper's numbers on CogACT's sizes, the same shares on others, refusals."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from evla_compile.demo.shipped_policy import DEMO_POLICY
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.loading.checkpoint import read_checkpoint
from evla_compile.settings.budgets.budget import Measured
from evla_compile.settings.budgets.cache import CacheBudget, CacheDecision
from evla_compile.settings.budgets.layers import LayerBudget, LayerDecision, drop_one_by_one, drop_trials
from evla_compile.settings.budgets.mlp import MLPBudget, MLPDecision
from evla_compile.settings.budgets.repair import RepairBudget, RepairDecision
from evla_compile.settings.budgets.sampler import SamplerBudget, SamplerDecision
from evla_compile.settings.budgets.tokens import TokenBudget, TokenDecision
from evla_compile.settings.budgets.vision import VisionBudget, VisionDecision
from evla_compile.settings.config import PRESETS, CompileConfig
from evla_compile.settings.sizes import ModelSizes, published_sizes


def sized(layers: int, patches: int) -> ModelSizes:
    """CogACT-Base with another depth and another number of patches."""
    sizes = published_sizes("base")
    return replace(
        sizes,
        dino=replace(sizes.dino, patches=patches),
        siglip=replace(sizes.siglip, patches=patches),
        language=replace(sizes.language, layers=layers),
    )


def counts(config: CompileConfig, sizes: ModelSizes) -> tuple[Any, ...]:
    found = config.resolve(sizes)
    return found.keep_layers, found.visual_tokens, found.key_tokens


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("l28-t112", (28, 112, 4)),
        ("l28-t56", (28, 56, 4)),
        ("l22-t112", (22, 112, 4)),
        ("l22-t56", (22, 56, 4)),
    ],
)
def test_presets_are_the_paper_s_numbers_on_cogact(preset: str, expected: tuple[int, ...]) -> None:
    for name in ("small", "base", "large"):
        assert counts(PRESETS[preset], published_sizes(name)) == expected
    assert PRESETS[preset].kept_neurons(11008) == 8256


@pytest.mark.parametrize(
    ("layers", "patches", "expected"),
    [(12, 64, (8, 14, 1)), (16, 256, (11, 56, 4)), (6, 256, (4, 56, 4)), (4, 16, (3, 4, 1)), (40, 576, (28, 126, 9))],
)
def test_defaults_keep_the_same_shares_of_other_sizes(layers: int, patches: int, expected: tuple[int, ...]) -> None:
    assert counts(CompileConfig(), sized(layers, patches)) == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"keep_layers": 0.69, "visual_tokens": 0.22}, (22, 56, 4)),
        ({"keep_layers": 20, "visual_tokens": 40, "key_tokens": 3}, (20, 40, 3)),
        ({"keep_layers": 20, "visual_tokens": 0.5, "key_tokens": 0.02}, (20, 128, 5)),
        ({"keep_layers": (0, 5, 31)}, ((0, 5, 31), 56, 4)),
        ({"keep_layers": None, "visual_tokens": None}, (None, None, 4)),
        ({"keep_layers": 0.999, "visual_tokens": 0.999}, (32, 256, 4)),
        ({"keep_layers": 0.001, "visual_tokens": None, "key_tokens": 0.001}, (1, None, 1)),
    ],
)
def test_a_budget_is_a_count_or_a_share(settings: dict[str, Any], expected: tuple[Any, ...]) -> None:
    found = CompileConfig(**settings).resolve(published_sizes("base"))
    assert (found.keep_layers, found.visual_tokens, found.key_tokens) == expected
    assert found.resolve(published_sizes("base")) == found
    assert CompileConfig.from_json(found.to_json()) == found


def test_one_is_a_count_and_a_whole_share_is_everything() -> None:
    everything = CompileConfig(keep_layers=1.0, visual_tokens=1.0)
    assert (everything.keep_layers, everything.visual_tokens) == (None, None)
    assert CompileConfig(keep_layers=1, visual_tokens=None).keep_layers == 1
    assert CompileConfig(keep_layers=1, visual_tokens=None) != replace(everything, visual_tokens=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_layers": 22.0}, "keep_layers=22.0: expected a count from 1 up, or a share above 0.0 and below 1.0; as a"
         " count, write 22"),
        ({"keep_layers": 0.0}, "keep_layers=0.0: expected a count from 1 up, or a share above 0.0"),
        ({"visual_tokens": -0.2}, "visual_tokens=-0.2: expected a count from 1 up, or a share above 0.0"),
        ({"visual_tokens": float("nan")}, "visual_tokens=nan: expected a count from 1 up, or a share"),
        ({"keep_layers": float("inf")}, "keep_layers=inf: expected a count from 1 up, or a share"),
        ({"key_tokens": 1.0}, "key_tokens=1.0: expected a count from 1 up, or a share"),
        ({"key_tokens": 0}, "key_tokens=0: expected a count from 1 up, or a share"),
        ({"visual_tokens": True}, "visual_tokens=True: expected a count from 1 up, or a share"),
        ({"visual_tokens": 3, "key_tokens": 4, "token_rule": "relevance"}, "visual_tokens=3 is below key_tokens=4: the"
         " key tokens count towards the budget; use visual_tokens=4 or more, or key_tokens=3 or less"),
        ({"visual_tokens": 0.01, "token_rule": "relevance"}, "visual_tokens=0.01 is below key_tokens=0.015625"),
    ],
)  # fmt: skip
def test_what_is_neither_a_count_nor_a_share_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CompileConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"keep_layers": 22}, "keep_layers=22: the decoder has 12 layers; use keep_layers=1 to 12, or a share of them"
         " such as keep_layers=0.69, which keeps 8"),
        ({"keep_layers": (0, 1, 12)}, "the decoder has the layers 0 to 11; name some of these"),
        ({"visual_tokens": 56, "key_tokens": 60, "token_rule": "relevance"}, "visual_tokens=56 is below key_tokens=60"),
        ({"visual_tokens": 65}, "visual_tokens=65: the policy sees 64 patches; use visual_tokens=1 to 64, or a share of"
         " them such as visual_tokens=0.22, which keeps 14"),
        ({"visual_tokens": 1, "key_tokens": 0.05, "token_rule": "relevance"}, "visual_tokens=1 is below key_tokens=3"),
        ({"keep_layers": 2}, "visual_tokens=14 with 2 decoder layers: selecting visual tokens needs two layers below it"
         " and one above; use keep_layers=3 or more, or visual_tokens=None (--visual-tokens all)"),
    ],
)  # fmt: skip
def test_a_budget_that_does_not_fit_is_refused_with_one_that_does(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        CompileConfig(**settings).resolve(sized(12, 64))


def test_key_tokens_beyond_the_budget_matter_to_the_paper_s_rule_alone() -> None:
    assert counts(CompileConfig(visual_tokens=3, key_tokens=4), sized(12, 64)) == (8, 3, 4)


def test_a_decoder_of_two_layers_is_not_told_to_keep_three() -> None:
    with pytest.raises(ValueError, match=re.escape("above; use visual_tokens=None")):
        CompileConfig().resolve(sized(2, 64))


@pytest.mark.parametrize(
    ("share", "width", "kept"),
    [(0.75, 11008, 8256), (1.0, 172, 172), (0.75, 172, 128), (0.01, 172, 64), (0.5, 40, 40), (0.99, 128, 128)],
)
def test_mlp_width_is_rounded_to_a_multiple_of_64(share: float, width: int, kept: int) -> None:
    assert CompileConfig(mlp_keep=share).kept_neurons(width) == kept


def test_defaults_fit_the_policy_of_the_demo() -> None:
    sizes = read_checkpoint(DEMO_POLICY).sizes
    assert counts(CompileConfig(), sizes) == (8, 14, 1)
    assert CompileConfig().kept_neurons(sizes.language.mlp_width) == 512  # of 688: 516, to the nearest 64


def test_a_configuration_is_made_of_the_budgets_of_the_techniques() -> None:
    config = CompileConfig(keep_layers=5, mlp_keep=0.5, visual_tokens=None, cache_interval=2)
    layers, mlp, vision, tokens, repair, sampler, cache = config.budgets()
    assert (layers, mlp) == (LayerBudget(keep_layers=5), MLPBudget(mlp_keep=0.5))
    assert (tokens, cache) == (TokenBudget(visual_tokens=None), CacheBudget(cache_interval=2))
    assert (vision, repair, sampler) == (VisionBudget(), RepairBudget(), SamplerBudget())
    assert list(config.to_json()) == [
        "keep_layers", "layer_rule", "mlp_keep", "vision_mlp_keep", "visual_tokens", "token_rule", "key_tokens",
        "task_share", "token_seed", "merge_tokens", "repair", "repair_rho", "repair_weights", "repair_frames",
        "ddim_steps", "solver", "solver_steps", "solver_timesteps", "cache_interval", "cache_steps",
        "cache_extrapolate", "cfg_scale", "text_tokens", "batch_size",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("settings", "unmeasured", "measurements"),
    [
        ({}, {}, set()),
        ({"keep_layers": 22}, {"keep_layers": 22}, set()),
        ({"keep_layers": 32, "layer_rule": "greedy"}, {}, set()),
        ({"keep_layers": 22, "layer_rule": "greedy"}, {"keep_layers": 22}, {"feature_shift"}),
        ({"keep_layers": (0, 1, 2), "layer_rule": "greedy"}, {}, set()),
        ({"mlp_keep": 0.5}, {"mlp_keep": 0.5}, {"neuron_scores"}),
        ({"visual_tokens": 56, "cache_interval": 5}, {}, set()),
        ({"cache_steps": (0, 3, 7), "cache_extrapolate": True}, {}, set()),
        ({"cache_steps": 3}, {"cache_steps": 3}, {"cache_shift"}),
        ({"cache_steps": 1}, {}, set()),  # there is one such set
        ({"cache_steps": 10}, {}, set()),
        ({"solver": "dpm++", "solver_steps": 3}, {"solver_steps": 3}, {"solver_shift"}),
        ({"solver": "dpm++", "solver_steps": 1}, {}, set()),
        ({"solver": "dpm++", "solver_timesteps": (90, 45, 10)}, {}, set()),
    ],
)
def test_what_is_measured_is_what_budgets_leave_open(
    settings: dict[str, Any], unmeasured: dict[str, Any], measurements: set[str]
) -> None:
    config = replace(CompileConfig.dense(), **settings)
    assert config.unmeasured(published_sizes("base")) == unmeasured
    assert config.measurements(published_sizes("base")) == measurements | {"layer_importance"}


def test_decisions_follow_from_what_was_measured() -> None:
    sizes = published_sizes("base")
    sizes = replace(sizes, language=replace(sizes.language, layers=3, mlp_width=128))
    scores = tuple(np.roll(np.arange(128, dtype=np.float32), 10 * layer) for layer in range(3))
    measured = Measured(layer_importance=(0.3, 0.1, 0.2), neuron_scores=scores)
    config = CompileConfig(keep_layers=2, mlp_keep=0.5, visual_tokens=40)
    layers, mlp, vision, tokens, repair, sampler, cache = config.decide(sizes, measured)
    assert layers == LayerDecision(keep=(0, 2), importance=(0.3, 0.1, 0.2), rule="importance")
    assert mlp == MLPDecision(neurons=((0, tuple(range(64, 128))), (2, (*range(20), *range(84, 128)))))
    assert tokens == TokenDecision(
        visual_tokens=40, key_tokens=4, task_share=0.5, token_rule="coverage", token_seed=0, merge_tokens=True
    )
    assert (vision, repair, sampler) == (VisionDecision(), RepairDecision(), SamplerDecision())
    assert cache == CacheDecision(steps=(0, 5), of=10)


def test_greedy_asks_for_every_layer_left_and_drops_that_which_shifts_least() -> None:
    asked: list[tuple[int, ...]] = []

    def shift(layers: tuple[int, ...], without: int) -> float:
        keep = tuple(layer for layer in layers if layer != without)
        asked.append(keep)
        return {(0, 2, 3): 1.0, (0, 1, 3): 1.0, (2, 3): 2.0}.get(keep, 3.0)

    assert drop_one_by_one(4, 2, shift) == (2, 3)
    assert asked == [(1, 2, 3), (0, 2, 3), (0, 1, 3), (0, 1, 2), (2, 3), (0, 3), (0, 2)]
    assert len(asked) == drop_trials(4, 2)


def test_a_decision_that_keeps_everything_is_idle_and_no_other() -> None:
    sizes = published_sizes("base")
    assert all(decision.idle(sizes) for decision in CompileConfig.dense().decide(sizes, None))
    decisions = CompileConfig().decide(sizes, None)
    assert [type(decision) for decision in decisions if decision.idle(sizes)] == [
        VisionDecision,
        RepairDecision,
        SamplerDecision,
    ]
    assert not RepairDecision(scope="last", rho=0.1, layers=(3,)).idle(sizes)


def test_neurons_of_other_layers_than_those_that_stay_are_refused() -> None:
    sizes = published_sizes("base")
    config = CompileConfig(keep_layers=(0, 1, 2), mlp_keep=0.75, repair="none")
    layers, mlp, *_ = config.decide(sizes, None)
    assert isinstance(mlp, MLPDecision)
    config.check_decision((layers, mlp, VisionDecision(), RepairDecision()), sizes, measured=True)
    others = MLPDecision(neurons=tuple((layer + 1, kept) for layer, kept in mlp.neurons))
    with pytest.raises(CalibrationError, match=re.escape("in layers (1, 2, 3), the settings ask for [8256]")):
        config.check_decision((layers, others, VisionDecision(), RepairDecision()), sizes, measured=True)
