"""Estimates without weights: against graphs with weights, quick ones against whole ones, and the published figures."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch

from evla_compile.compiled_policy import compile
from evla_compile.estimate.devices import DEVICES, Device
from evla_compile.estimate.estimates import Estimate, estimate, estimate_upstream, estimates, quick_estimates, skeleton
from evla_compile.estimate.footprint import Footprint, footprint_by_component
from evla_compile.families.cogact.capture import capture, capture_upstream
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.contract import measure
from evla_compile.passes import PruneLayers, UnrollDiffusion
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import stand_in_plan
from evla_compile.settings.sizes import ModelSizes, published_sizes

DENSE = CompileConfig.dense(text_tokens=9, batch_size=2, ddim_steps=2)
CONFIGS = {
    "all": replace(DENSE, keep_layers=6, mlp_keep=0.5, visual_tokens=8, cache_interval=2),
    "few layers": replace(DENSE, keep_layers=(0, 2, 6), visual_tokens=8),
    "dense": DENSE,
}


@pytest.fixture(scope="module")
def deep_sizes(small_sizes: ModelSizes) -> ModelSizes:
    """The small sizes with more blocks of every kind than quick estimates capture, each stack of another depth."""
    return replace(
        small_sizes,
        dino=replace(small_sizes.dino, depth=3),
        siglip=replace(small_sizes.siglip, depth=4),
        language=replace(small_sizes.language, layers=7, mlp_width=128),
        action=replace(small_sizes.action, depth=3),
    )


@pytest.fixture(scope="module")
def whole(deep_sizes: ModelSizes) -> dict[str, Estimate]:
    return estimates(deep_sizes, CONFIGS)


def some_footprint(flops: int, read_bytes: int) -> Footprint:
    return Footprint(
        ops=1, flops=flops, paper_flops=0, parameters=0, weight_bytes=2 * read_bytes, read_bytes=read_bytes
    )


def test_an_estimate_is_what_compiling_the_policy_with_its_weights_gives(small_policy: CogACT) -> None:
    config = replace(DENSE, keep_layers=3, visual_tokens=8, cache_interval=2)
    compiled = compile(small_policy, config, plan=stand_in_plan(small_policy.sizes, config))
    found = estimate(small_policy.sizes, config, dtype=torch.float32)
    names_and_flops = [(report.name, report.after.flops) for report in found.passes]
    assert names_and_flops == [(report.name, report.after.flops) for report in compiled.report.passes]
    total, expected = found.total, measure(compiled.graph)
    assert (total.flops, total.paper_flops) == (expected.flops, expected.paper_flops)
    assert total.weight_bytes == expected.weight_bytes
    assert total.ops == expected.ops + 3  # the copy of each kept layer's attention output that a CPU does without


def test_quick_estimates_are_those_of_the_whole_policy(deep_sizes: ModelSizes, whole: dict[str, Estimate]) -> None:
    quick = quick_estimates(deep_sizes, CONFIGS)
    assert list(quick) == list(whole) == list(CONFIGS)
    for name, found in quick.items():
        assert found == replace(whole[name], passes=()), name


def test_what_is_kept_decides_what_is_estimated(whole: dict[str, Estimate]) -> None:
    dense, cut, few = whole["dense"], whole["all"], whole["few layers"]
    assert cut.vision == dense.vision == few.vision
    assert few.language.flops < cut.language.flops < dense.language.flops
    assert few.language.parameters < cut.language.parameters < dense.language.parameters
    assert cut.action.flops < few.action.flops == dense.action.flops


def test_upstream_is_counted_as_its_whole_graph_and_holds_the_whole_checkpoint(deep_sizes: ModelSizes) -> None:
    with torch.device("meta"):
        policy = UpstreamCogACT(deep_sizes)
    expected = footprint_by_component(capture_upstream(policy.eval().requires_grad_(False), DENSE))
    found = estimate_upstream(deep_sizes, DENSE, dtype=torch.float32)
    for component, counted in found.components.items():
        of_checkpoint = {"parameters": counted.parameters, "weight_bytes": counted.weight_bytes}
        assert counted == replace(expected[component], **of_checkpoint), component
    assert found.total.parameters == sum(tensor.numel() for tensor in policy.state_dict().values())
    assert found.total.weight_bytes == 4 * found.total.parameters
    assert found.total.read_bytes < found.total.weight_bytes


def test_configurations_that_begin_alike_share_their_capture_and_passes(
    small_sizes: ModelSizes, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: object) -> Any:
            calls.append(name)
            return function(*arguments)

        return call

    monkeypatch.setattr("evla_compile.estimate.estimates.capture", counted("capture", capture))
    for kind in (UnrollDiffusion, PruneLayers):
        monkeypatch.setattr(kind, "rewrite", counted(kind.__name__, kind.rewrite))
    pruned = replace(DENSE, keep_layers=3)
    configs = {"a": pruned, "b": DENSE, "c": replace(pruned, cache_interval=2)}
    assert list(estimates(small_sizes, configs)) == ["a", "b", "c"]
    assert calls == ["capture", "UnrollDiffusion", "PruneLayers"]


def test_configurations_of_other_inputs_are_captured_anew(small_sizes: ModelSizes) -> None:
    one, two = estimates(small_sizes, {"one": replace(DENSE, batch_size=1), "two": DENSE}).values()
    assert two.vision.paper_flops == 2 * one.vision.paper_flops


def test_a_skeleton_has_the_dtypes_of_a_loaded_policy_and_no_weights(small_sizes: ModelSizes) -> None:
    policy = skeleton(small_sizes)
    assert all(parameter.is_meta for parameter in policy.parameters())
    assert {p.dtype for p in policy.action_model.parameters()} == {torch.float32}
    others = (policy.vision_backbone, policy.projector, policy.llm_backbone)
    assert {p.dtype for module in others for p in module.parameters()} == {torch.bfloat16}


def test_bytes_follow_the_dtype_and_the_action_head_stays_float32(whole: dict[str, Estimate]) -> None:
    dense = whole["dense"]
    assert dense.dtype == "bfloat16"
    assert dense.language.read_bytes < dense.language.weight_bytes
    assert dense.action.weight_bytes == 4 * dense.action.parameters
    # Rows of 2 bytes and 32 channels of a vocabulary of 64, for 2 x 9 text tokens.
    assert dense.language.weight_bytes - dense.language.read_bytes == 2 * 32 * (64 - 18)


def test_the_roofline_is_the_sum_over_components_with_the_action_head_in_float32() -> None:
    device = Device(
        name="toy", memory_bytes=100, bandwidth=1.0, float32_flops=1.0, bfloat16_flops=10.0, source="made up"
    )
    found = Estimate(
        dtype="bfloat16", vision=some_footprint(100, 3), language=some_footprint(20, 30), action=some_footprint(7, 2)
    )
    assert found.roofline_seconds(device) == 10 + 30 + 7
    assert found.fits(device)
    assert not found.fits(replace(device, memory_bytes=69))


def test_json_has_the_total_and_the_rooflines_of_devices_that_hold_the_weights() -> None:
    one = some_footprint(10**12, 10**10)
    found = Estimate(dtype="bfloat16", vision=one, language=one, action=one)
    values = json.loads(json.dumps(found.to_json()))
    assert values["total"] == asdict(found.total)
    assert values["vision"]["flops"] == 10**12
    assert set(values["roofline_seconds"]) == {"agx-orin", "thor", "h100", "h200"}
    assert values["roofline_seconds"]["h200"] == found.roofline_seconds(DEVICES["h200"])


@pytest.mark.parametrize("count", [estimates, quick_estimates])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"keep_layers": 8}, "keep_layers=8: the decoder has 7 layers"),
        ({"visual_tokens": 17}, "visual_tokens=17: the policy sees 16 patches"),
        ({"keep_layers": 2, "visual_tokens": 8}, "visual_tokens=8 with 2 decoder layers"),
    ],
)
def test_budgets_that_do_not_fit_are_refused(
    deep_sizes: ModelSizes, count: Callable[..., object], change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        count(deep_sizes, {"": replace(DENSE, **change)})


def test_other_dtypes_are_refused(small_sizes: ModelSizes) -> None:
    for count in (estimate, estimate_upstream):
        with pytest.raises(ValueError, match=r"dtype=torch\.float16: expected torch\.float32 or torch\.bfloat16"):
            count(small_sizes, DENSE, dtype=torch.float16)


def test_the_published_policy_has_the_published_figures() -> None:
    """The one test at full size, some ten seconds: CogACT-Base as published, and EfficientVLA's headline row."""
    config = CompileConfig(text_tokens=26)
    sizes = published_sizes("base")
    upstream, ours = estimate_upstream(sizes, config), quick_estimates(sizes, {"": config})[""]
    assert upstream.total.parameters == 7_630_224_071
    assert round(upstream.total.weight_bytes / 1e9, 1) == 15.4
    published = {"vision": 405.50, "language": 3726.55, "action": 57.96}
    counted = {component: found.paper_flops / 1e9 for component, found in upstream.components.items()}
    assert counted == pytest.approx(published, rel=1e-3)
    assert ours.total.paper_flops / upstream.total.paper_flops < 0.269
