"""From settings to passes, and `compile` as users call it."""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

import evla_compile as evla
from evla_compile.calibration.calibrate import calibrate
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.compiler import pipeline
from evla_compile.compiler.deviations import measure_deviations
from evla_compile.compiler.pipeline import build_passes
from evla_compile.exporters.precision import lower
from evla_compile.exporters.split import Piece
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import get_tensor
from evla_compile.graph.sites import module_path
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import InputSignature, draw_noise
from evla_compile.passes.lower_precision import lowered_sites
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.mlp import MLPDecision
from evla_compile.settings.config import PRESETS, CompileConfig
from evla_compile.settings.plan import Plan, check_plan
from evla_compile.settings.sizes import published_sizes
from evla_compile.settings.tolerances import TOLERANCES, check
from tests.paper_config import paper_config

BUDGETS = paper_config(keep_layers=4)


@pytest.fixture(scope="module")
def frames(golden: dict[str, Any], frame: Image.Image) -> list[Frame]:
    return [Frame(frame, case["instruction"]) for case in golden["cases"]]


@pytest.fixture(scope="module")
def compiled(tiny_policy: CogACT, frames: list[Frame]) -> CompiledPolicy:
    return evla.compile(tiny_policy, paper_config(), calibration=frames, progress=False)


def test_defaults_fit_a_decoder_of_another_depth_and_are_recorded_in_numbers(compiled: CompiledPolicy) -> None:
    found = compiled.report.to_json()["config"]
    assert (found["keep_layers"], found["visual_tokens"], found["key_tokens"]) == (4, 56, 4)
    assert compiled.report.config == compiled.config


def test_paper_row_runs_all_passes_in_their_order(compiled: CompiledPolicy) -> None:
    assert [report.name.split("(")[0] for report in compiled.report.passes] == [
        "UnrollDiffusion",
        "PruneLayers",
        "PruneMLP",
        "SelectTokens",
        "CacheFeatures",
        "NarrowLastLayer",
        "SpecializeShapes",
        "FoldConstants",
    ]
    assert all(report.changes for report in compiled.report.passes)


def test_dense_runs_only_exact_passes(tiny_policy: CogACT) -> None:
    config = CompileConfig.dense()
    plan = Plan(decisions=(LayerDecision(keep=tuple(range(6))),))
    assert all(rewrite.exact for rewrite in build_passes(config, plan, tiny_policy.sizes))


def test_every_report_continues_the_one_before(compiled: CompiledPolicy) -> None:
    reports = compiled.report.passes
    assert all(a.after == b.before for a, b in pairwise(reports))
    first, last = reports[0].after, reports[-1].after
    assert last.flops < first.flops
    assert last.weight_bytes < first.weight_bytes


def test_report_prints_every_pass_and_the_deviation(compiled: CompiledPolicy) -> None:
    text = str(compiled.report)
    assert "SelectTokens(visual_tokens=56, key_tokens=4, task_share=0.5)" in text
    assert "samples: " in text
    assert {deviation.stage for deviation in compiled.report.deviations} == {"cognition", "samples", "actions"}
    assert all(deviation.relative > 0 for deviation in compiled.report.deviations)


@pytest.mark.parametrize("factors", [(1.01, 1.2, 1.05), (1.2, 1.01, 1.05), (1.01, 1.05, 1.2)])
def test_the_deviation_is_that_of_the_worst_frame(factors: tuple[float, ...], small_policy: CogACT) -> None:
    """The compiled policy here is the dense one, all outputs of a frame multiplied by a factor of its own."""
    config = CompileConfig.dense(text_tokens=26, ddim_steps=1)
    left = list(factors)

    def outputs(*arrays: NDArray[Any], stages: tuple[str, ...]) -> dict[str, NDArray[Any]]:
        image, ids, length, noise = map(torch.from_numpy, arrays)
        cognition = small_policy.cognition(image, ids, length)
        samples = small_policy.denoise(cognition, noise, ddim_steps=1, cfg_scale=config.cfg_scale)
        factor = left.pop(0)
        return {"cognition": factor * cognition.numpy(), "samples": factor * samples.numpy()}

    signature = InputSignature.of(small_policy.sizes, batch_size=1, text_tokens=26)
    compiled: Any = SimpleNamespace(config=config, signature=signature, outputs=outputs)
    frames = [Frame(Image.new("RGB", (4, 4), (shade, 0, 0)), "pick") for shade in (0, 100, 200)]
    found = {each.stage: each for each in measure_deviations(small_policy, compiled, frames)}
    assert list(found) == ["cognition", "samples", "actions"]
    assert found["cognition"].relative == pytest.approx(0.2, rel=1e-5)
    assert found["samples"].relative == pytest.approx(0.2, rel=1e-5)
    assert {each.frames for each in found.values()} == {3}
    assert not left


def test_dense_policy_does_not_deviate(tiny_policy: CogACT, frames: list[Frame]) -> None:
    dense = evla.compile(tiny_policy, CompileConfig.dense(), calibration=frames[:1], progress=False)
    assert all(deviation.relative < TOLERANCES.lowered for deviation in dense.report.deviations)


def test_frames_are_measured_where_no_budget_needs_it_too(small_policy: CogACT, frame: Image.Image) -> None:
    """A float16 export of the dense policy needs the ranges; the command line had them, and the interface had not."""
    config, frames = CompileConfig.dense(text_tokens=26, ddim_steps=1), [Frame(frame, "lift")]
    dense = evla.compile(small_policy, config, calibration=frames, progress=False)
    assert dense.plan == calibrate(small_policy, frames, config, progress=False)
    assert dense.plan.frames == 1
    assert {path for path, _ in dense.plan.ranges} == {module_path(site) for site in lowered_sites(dense.graph.graph)}
    lower([Piece(name="policy", graph=dense.graph, inputs=(), outputs=())], "float16", dense.plan.ranges)


def test_compiling_leaves_the_policy_alone(tiny_policy: CogACT, frame: Image.Image, compiled: CompiledPolicy) -> None:
    before = {name: tensor.clone() for name, tensor in tiny_policy.state_dict().items()}
    expected = tiny_policy.predict_action(frame, "pick coke can", "bridge_orig", seed=3)
    evla.compile(tiny_policy, BUDGETS, plan=compiled.plan)
    assert all(torch.equal(tensor, before[name]) for name, tensor in tiny_policy.state_dict().items())
    assert np.array_equal(tiny_policy.predict_action(frame, "pick coke can", "bridge_orig", seed=3), expected)


def test_kept_weights_are_shared_with_the_policy(tiny_policy: CogACT, compiled: CompiledPolicy) -> None:
    name = "llm_backbone.llm.model.layers.3.self_attn.q_proj.weight"
    assert get_tensor(compiled.graph, name).data_ptr() == tiny_policy.get_parameter(name).data_ptr()


def test_a_plan_gives_the_same_policy_as_its_calibration(
    tiny_policy: CogACT, compiled: CompiledPolicy, frame: Image.Image
) -> None:
    again = evla.compile(tiny_policy, BUDGETS, plan=compiled.plan)
    first, second = (policy.predict_action(frame, "pick coke can", "bridge_orig") for policy in (compiled, again))
    assert np.array_equal(first, second)
    assert again.report.deviations == ()
    assert "not measured" in str(again.report)


def test_predicted_actions_are_a_chunk(compiled: CompiledPolicy, frame: Image.Image) -> None:
    actions = compiled.predict_action(frame, "pick coke can", "bridge_orig")
    assert actions.shape == (16, 7)
    assert actions.dtype == np.float64
    other = compiled.predict_action(frame, "pick coke can", "bridge_orig", seed=1)
    assert not np.array_equal(actions, other)
    noise = draw_noise((16, 7), 1)
    assert np.array_equal(other, compiled.predict_action(frame, "pick coke can", "bridge_orig", noise=noise))


def test_kept_tokens_are_the_graph_s(compiled: CompiledPolicy, tiny_policy: CogACT, frame: Image.Image) -> None:
    kept = compiled.kept_tokens(frame, "pick coke can")
    assert kept.shape == (56,)
    assert (np.diff(kept) > 0).all()
    assert 0 <= kept[0] <= kept[-1] < 256
    dense = evla.compile(tiny_policy, CompileConfig.dense(ddim_steps=1))
    assert dense.kept_tokens(frame, "pick coke can").tolist() == list(range(256))


def test_wrong_inputs_are_refused(compiled: CompiledPolicy) -> None:
    image = np.zeros((1, 224, 224, 3), dtype=np.uint8)
    ids, noise = np.ones((1, 32), dtype=np.int64), np.zeros((1, 16, 7), dtype=np.float32)
    with pytest.raises(ValueError, match=r"text_length=\[33\]: expected from 2 to 32"):
        compiled.sample(image, ids, np.array([33]), noise)
    with pytest.raises(ValueError, match="input_ids has ids from -1 to -1: expected from 0 to"):
        compiled.sample(image, -ids, np.array([20]), noise)
    with pytest.raises(ValueError, match="input_ids has ids from 99999 to 99999: expected from 0 to"):
        compiled.sample(image, 99999 * ids, np.array([20]), noise)
    with pytest.raises(ValueError, match=r"image is float32\[1, 224, 224, 3\]: expected a numpy array uint8"):
        compiled.sample(image.astype(np.float32), ids, np.array([20]), noise)
    with pytest.raises(ValueError, match="expected a numpy array"):
        compiled.sample(image, ids[:, :20], np.array([20]), noise)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (paper_config(keep_layers=7), "keep_layers=7: the decoder has 6 layers"),
        (paper_config(keep_layers=(0, 1, 6)), "the layers 0 to 5"),
        (paper_config(keep_layers=4, visual_tokens=257), "visual_tokens=257: the policy sees 256 patches"),
        (paper_config(keep_layers=2), "selecting visual tokens needs two layers below it"),
        (paper_config(keep_layers=(1, 4), mlp_keep=1.0), "selecting visual tokens needs two layers below it"),
    ],
)
def test_budgets_that_the_policy_lacks_are_refused(
    config: CompileConfig, message: str, tiny_policy: CogACT, frames: list[Frame]
) -> None:
    with pytest.raises(ValueError, match=message):
        evla.compile(tiny_policy, config, calibration=frames, progress=False)


def test_reduced_budgets_without_frames_or_plan_are_refused(tiny_policy: CogACT) -> None:
    with pytest.raises(evla.CalibrationError, match="give calibration= frames"):
        evla.compile(tiny_policy, BUDGETS)


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        ({}, paper_config(keep_layers=5), "settings ask for keep_layers=5"),
        ({}, paper_config(keep_layers=(0, 1, 2, 3)), "settings ask for keep_layers"),
        ({"keep": (1, 2, 3, 9)}, BUDGETS, "keeps layer 9"),
        ({"keep": (2, 1, 3, 4)}, BUDGETS, "settings ask for keep_layers=4"),
        (
            {},
            paper_config(keep_layers=4, layer_rule="greedy"),
            "chosen by layer_rule='importance', the settings ask for layer_rule='greedy'",
        ),
        ({"rule": None}, BUDGETS, "the plan's layers were named, the settings ask for layer_rule='importance'"),
        ({}, paper_config(keep_layers=4, mlp_keep=0.5), "settings ask for"),
        ({}, paper_config(keep_layers=4, mlp_keep=1.0), "settings ask for all"),
        ({"neurons": (*range(127), 999)}, BUDGETS, "beyond the decoder's 172"),
        ({"neurons": (*range(126), 127, 126)}, BUDGETS, "neurons of layer 1: indices .* in ascending order"),
    ],
)
def test_a_plan_for_something_else_is_refused(
    change: dict[str, Any], config: CompileConfig, message: str, compiled: CompiledPolicy, tiny_policy: CogACT
) -> None:
    layers, mlp, *_ = compiled.plan.decisions
    if "neurons" in change:
        mlp = MLPDecision(neurons=tuple((layer, change["neurons"]) for layer in compiled.plan.keep_layers))
    else:
        layers = replace(layers, **change)
    plan = replace(compiled.plan, decisions=(layers, mlp))
    with pytest.raises(evla.CalibrationError, match=message):
        check_plan(plan, config, tiny_policy.sizes)


def test_the_rule_of_a_plan_matters_only_where_the_settings_leave_layers_to_it(
    compiled: CompiledPolicy, tiny_policy: CogACT
) -> None:
    named = replace(BUDGETS, keep_layers=compiled.plan.keep_layers, layer_rule="greedy")
    check_plan(compiled.plan, named, tiny_policy.sizes)
    everything = replace(compiled.plan, decisions=(LayerDecision(keep=tuple(range(6))),))
    check_plan(everything, CompileConfig.dense(), tiny_policy.sizes)


def test_presets_are_the_rows_of_table_2() -> None:
    counts = {name: config.resolve(published_sizes("base")) for name, config in PRESETS.items() if "-t" in name}
    rows = {name: (config.keep_layers, config.visual_tokens) for name, config in counts.items()}
    assert rows == {"l28-t112": (28, 112), "l28-t56": (28, 56), "l22-t112": (22, 112), "l22-t56": (22, 56)}
    for config in counts.values():
        assert (config.mlp_keep, config.cache_interval, config.layer_rule) == (0.75, 5, "importance")
        assert (config.token_rule, config.merge_tokens, config.repair) == ("relevance", False, "none")
    with pytest.raises(ValueError, match="unknown preset 'l20'; expected one of balanced"):
        CompileConfig.preset("l20")


def test_other_presets_keep_less_and_less_and_are_repaired() -> None:
    ours = [CompileConfig.preset(name).resolve(published_sizes("base")) for name in ("faithful", "balanced", "fast")]
    assert [(config.keep_layers, config.visual_tokens) for config in ours] == [(28, 112), (22, 56), (16, 56)]
    assert {(config.token_rule, config.merge_tokens) for config in ours} == {("coverage", True)}
    assert [config.repair for config in ours] == ["all", "all", "last"]
    assert [config.vision_mlp_keep for config in ours] == [1.0, 1.0, 0.25]
    assert CompileConfig.preset("balanced") == CompileConfig()


def test_bfloat16_policy_compiles_and_stays_near_float32(
    tiny_checkpoint: Path, tiny_policy: CogACT, frame: Image.Image, frames: list[Frame]
) -> None:
    half = evla.load(tiny_checkpoint, dtype=torch.bfloat16)
    plan = calibrate(tiny_policy, frames, paper_config(keep_layers=4, visual_tokens=None), progress=False)
    config = paper_config(keep_layers=4, visual_tokens=None)
    found = evla.compile(half, config, plan=plan).predict_action(frame, "pick coke can", "bridge_orig")
    full = evla.compile(tiny_policy, config, plan=plan).predict_action(frame, "pick coke can", "bridge_orig")
    check("actions", found[:, :6], full[:, :6], tolerance=0.2)


def test_bfloat16_policy_reports_its_deviation_and_is_not_exported(
    tiny_checkpoint: Path, frames: list[Frame], tmp_path: Path
) -> None:
    half = evla.load(tiny_checkpoint, dtype=torch.bfloat16)
    compiled = evla.compile(half, CompileConfig.dense(ddim_steps=1), calibration=frames[:1], progress=False)
    assert {deviation.stage for deviation in compiled.report.deviations} == {"cognition", "samples", "actions"}
    with pytest.raises(evla.ExportError, match="loaded in bfloat16"):
        compiled.export(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_an_instruction_beyond_the_text_budget_is_refused_before_the_work(
    tiny_policy: CogACT, frame: Image.Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "capture", None)
    frames = [Frame(frame, "open"), Frame(frame, "open"), Frame(frame, "open " * 40)]
    with pytest.raises(ValueError, match="its budget is 32"):
        evla.compile(tiny_policy, BUDGETS, calibration=frames, progress=False)


def test_query_heads_may_share_key_heads(tiny_policy: CogACT) -> None:
    sizes = replace(tiny_policy.sizes, language=replace(tiny_policy.sizes.language, kv_heads=2))
    assert BUDGETS.resolve(sizes).visual_tokens == 56
