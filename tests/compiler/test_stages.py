"""Artifacts stage by stage: half precision, parts, and the first stage that leaves its tolerance."""

import json
import shutil
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import numpy_helper
from PIL import Image

import evla_compile as evla
from evla_compile import runtime
from evla_compile.artifact.cases import read_cases
from evla_compile.artifact.manifest import read_manifest, write_manifest
from evla_compile.artifact.records import FileRecord
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.exporters.stage_run import StageRun
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.sites import module_path
from evla_compile.host.inputs import GraphInputs
from evla_compile.passes.lower_precision import lowered_sites
from evla_compile.runtime import RuntimePolicy
from evla_compile.settings import tolerances
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan
from evla_compile.settings.precision import PRECISION_ROWS, Precision
from evla_compile.settings.tolerances import lowered_tolerance, relative_error
from evla_compile.verification import verify as verification
from tests.paper_config import paper_config


def copy_policy(compiled: CompiledPolicy, plan: Plan) -> CompiledPolicy:
    return CompiledPolicy(
        graph=compiled.graph,
        config=compiled.config,
        plan=plan,
        sizes=compiled.sizes,
        processor=compiled.processor,
        report=compiled.report,
        frames=compiled.frames,
    )


@pytest.fixture(scope="module")
def compiled_policy(tiny_policy: CogACT, frame: Image.Image) -> CompiledPolicy:
    """Four layers, 75 % of the neurons, 40 patches, cached, calibrated on one frame."""
    config = paper_config(keep_layers=(0, 1, 2, 4), visual_tokens=40, cache_interval=2, ddim_steps=5)
    frames = [evla.Frame(frame, "pick up the apple")]
    plan = evla.calibrate(tiny_policy, frames, config, progress=False)
    return evla.compile(tiny_policy, config, calibration=frames, plan=plan)


@pytest.fixture(scope="module")
def compiled_artifact(compiled_policy: CompiledPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compiled") / "artifact"
    compiled_policy.export(folder)
    return folder


def accept_model(folder: Path) -> None:
    """Make the manifest of `folder` agree with its changed graph."""
    manifest = read_manifest(folder / "manifest.json")
    (part,) = manifest.parts
    manifest = replace(manifest, parts=(replace(part, model=FileRecord.measure(folder / part.model.name)),))
    write_manifest(manifest, folder / "manifest.json")


@pytest.mark.parametrize(
    ("weight", "stage"),
    [
        ("vision_backbone.dino_featurizer.patch_embed.proj.bias", "patches"),
        ("projector.projector.4.bias", "projected"),
        ("llm_backbone.llm.model.layers.2.input_layernorm.weight", r"layers\.2"),
        ("action_model.net.blocks.0.mlp.fc1.bias", r"denoising\.0"),
    ],
)
def test_the_first_stage_that_is_wrong_is_named(
    weight: str, stage: str, compiled_artifact: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(compiled_artifact, copy)
    model = onnx.load(copy / "model.onnx")
    (changed,) = [tensor for tensor in model.graph.initializer if tensor.name == weight]
    changed.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(changed) + np.float32(1.0), weight))
    onnx.save(model, copy / "model.onnx")
    accept_model(copy)
    with pytest.raises(evla.VerificationError, match=rf"ONNX Runtime: {stage} is .* first stage to leave it"):
        evla.verify(copy, threads=1)


def test_every_stage_is_compared_in_data_flow_order(compiled_artifact: Path) -> None:
    found = evla.verify(compiled_artifact, threads=1)
    assert [name for name, _ in found.stages] == [
        *("patches", "projected", "layers.0", "layers.1", "layers.2", "layers.4", "cognition"),
        *("denoising.0", "denoising.1", "denoising.2", "denoising.3", "samples"),
    ]
    assert max(error for _, error in found.stages) < 1e-5


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_is_verified_stage_by_stage(
    precision: Precision, compiled_policy: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_policy.export(tmp_path / "policy", precision=precision)
    loaded = []

    def load(*arguments: Any, **settings: Any) -> RuntimePolicy:
        loaded.append(runtime.load(*arguments, **settings))
        return loaded[-1]

    monkeypatch.setattr(verification, "load", load)
    found = evla.verify(tmp_path / "policy", threads=1)
    assert [policy.latency.summary()[0].first > 0 for policy in loaded] == [True]  # the runtime ran the cases too
    assert loaded[0].widened == (precision == "bfloat16")
    stages = dict(found.stages)
    assert 1e-5 < stages["patches"] < lowered_tolerance(precision, "patches")
    assert 0 < stages["samples"] < found.tolerance == lowered_tolerance(precision, "samples")
    manifest = read_manifest(tmp_path / "policy" / "manifest.json")
    assert manifest.precision == precision
    model = onnx.load(tmp_path / "policy" / "model.onnx")
    wanted = onnx.TensorProto.BFLOAT16 if precision == "bfloat16" else onnx.TensorProto.FLOAT16
    dtypes = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    assert dtypes["llm_backbone.llm.model.layers.2.mlp.up_proj.weight.T"] == wanted
    assert dtypes["action_model.net.x_embedder.linear.bias"] == onnx.TensorProto.FLOAT
    halved = {name for name, dtype in dtypes.items() if dtype == wanted}
    assert not {name for name in halved if name.startswith("action_model") or "norm" in name}
    report = json.loads((tmp_path / "policy" / "report.json").read_text(encoding="utf-8"))
    assert set(report["precision"]) == set(stages)


def test_float16_without_observed_ranges_is_refused(compiled_policy: CompiledPolicy, tmp_path: Path) -> None:
    blind = copy_policy(compiled_policy, replace(compiled_policy.plan, ranges=()))
    with pytest.raises(evla.ExportError, match="were not observed in calibration"):
        blind.export(tmp_path / "policy", precision="float16")
    hot = "llm_backbone.llm.model.layers.4.mlp.down_proj"
    ranges = tuple((name, 1e5 if name == hot else largest) for name, largest in compiled_policy.plan.ranges)
    with pytest.raises(evla.ExportError, match=f"float16 cannot hold {hot}, where calibration observed 1e\\+05"):
        copy_policy(compiled_policy, replace(compiled_policy.plan, ranges=ranges)).export(
            tmp_path / "policy", precision="float16"
        )
    assert not list(tmp_path.iterdir())


def test_a_lowered_policy_out_of_tolerance_is_never_written(
    compiled_policy: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    strict = replace(PRECISION_ROWS["bfloat16"], features=1e-4)
    monkeypatch.setattr(tolerances, "PRECISION_ROWS", {**PRECISION_ROWS, "bfloat16": strict})
    with pytest.raises(evla.VerificationError, match=r"in bfloat16: patches is .*the first that is compared"):
        compiled_policy.export(tmp_path / "policy", precision="bfloat16")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def small_compiled(small_policy: CogACT) -> CompiledPolicy:
    """The small policy without a lossy pass, and ranges as if they had been observed."""
    compiled = evla.compile(small_policy, CompileConfig.dense(text_tokens=9, ddim_steps=1))
    ranges = tuple((module_path(site), 1.0) for site in lowered_sites(compiled.graph.graph))
    return copy_policy(compiled, replace(compiled.plan, ranges=ranges))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lowered_export_is_held_to_what_verify_computes(
    precision: Precision, small_compiled: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ONNX Runtime rounds otherwise than torch, so that one may be within the tolerance and the other beyond it."""
    original = StageRun.run

    def beyond_it(graphs: StageRun, inputs: GraphInputs) -> dict[str, NDArray[Any]]:
        values = original(graphs, inputs)
        return values | {"samples": values["samples"] + 1}

    monkeypatch.setattr(StageRun, "run", beyond_it)
    with pytest.raises(
        evla.VerificationError, match=rf"this policy in {precision} on ONNX Runtime: samples is .* from"
    ):
        small_compiled.export(tmp_path / "policy", precision=precision)
    assert not list(tmp_path.iterdir())


def test_an_export_without_onnx_runtime_says_what_was_not_compared(
    small_compiled: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with caplog.at_level("WARNING"):
        small_compiled.export(tmp_path / "policy", precision="float16")
    assert "compared in torch alone" in caplog.text
    assert "evla verify" in caplog.text


def test_float16_that_overflows_is_refused_by_the_first_stage(small_policy: CogACT, tmp_path: Path) -> None:
    """A plan of other frames may show ranges that float16 can hold, where these frames have others."""
    policy = deepcopy(small_policy)
    policy.get_parameter("projector.projector.4.bias").fill_(1e6)
    compiled = evla.compile(policy, CompileConfig.dense(text_tokens=9, ddim_steps=1))
    ranges = tuple((module_path(site), 1.0) for site in lowered_sites(compiled.graph.graph))
    message = "this policy in float16: projected cannot be compared: .* of its .* are infinite or not a number: do not"
    with pytest.raises(evla.VerificationError, match=message):
        copy_policy(compiled, replace(compiled.plan, ranges=ranges)).export(tmp_path / "policy", precision="float16")
    assert not list(tmp_path.iterdir())


def test_a_policy_that_overflows_float32_is_not_exported(small_policy: CogACT, tmp_path: Path) -> None:
    policy = deepcopy(small_policy)
    policy.get_parameter("projector.projector.4.weight").fill_(3e38)
    compiled = evla.compile(policy, CompileConfig.dense(text_tokens=9, ddim_steps=1))
    with pytest.raises(evla.ExportError, match=r"recorded frame 0: .* values of projected are infinite"):
        compiled.export(tmp_path / "policy")
    assert not list(tmp_path.iterdir())


def test_a_policy_loaded_in_half_precision_says_how_to_export_it(small_bfloat16_policy: CogACT, tmp_path: Path) -> None:
    compiled = evla.compile(small_bfloat16_policy, CompileConfig.dense(text_tokens=9))
    with pytest.raises(evla.ExportError, match=r"loaded in bfloat16: load it with dtype=torch\.float32.*='bfloat16'"):
        compiled.export(tmp_path / "policy")


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_chain_of_parts_verifies_and_runs_like_the_whole(
    precision: Precision, compiled_policy: CompiledPolicy, tmp_path: Path
) -> None:
    compiled_policy.export(tmp_path / "policy", parts=3, precision=precision)
    found = evla.verify(tmp_path / "policy", threads=1)
    assert [name for name, _ in found.stages][-1] == "samples"
    manifest = read_manifest(tmp_path / "policy" / "manifest.json")
    assert [part.name for part in manifest.parts] == ["perception-1", "perception-2", "action"]
    assert [part.model.name for part in manifest.parts] == [
        *("model.perception-1.onnx", "model.perception-2.onnx", "model.action.onnx")
    ]
    if precision == "float32":
        (case, *_) = read_cases(tmp_path / "policy" / "cases.npz", manifest)
        samples = evla.runtime.load(tmp_path / "policy", threads=1).sample(*case.inputs.arrays)
        assert relative_error(samples, case.outputs["samples"]) < 1e-5
