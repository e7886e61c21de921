"""Artifacts stage by stage: half precision, parts, and the first stage that leaves its tolerance."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from PIL import Image

import evla_compile as evla
from evla_compile import runtime, tolerances, verification
from evla_compile.compiled import CompiledPolicy
from evla_compile.config import CompileConfig, Precision
from evla_compile.manifest import FileRecord, read_manifest, write_manifest
from evla_compile.model.policy import CogACT
from evla_compile.plan import Plan
from evla_compile.recorded import read_cases
from evla_compile.runtime import RuntimePolicy
from evla_compile.tolerances import TOLERANCES, lowered_tolerance, relative_error


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
    config = CompileConfig(keep_layers=(0, 1, 2, 4), visual_tokens=40, cache_interval=2, ddim_steps=5)
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
    monkeypatch.setattr(tolerances, "TOLERANCES", replace(TOLERANCES, bfloat16_features=1e-4))
    with pytest.raises(evla.VerificationError, match=r"in bfloat16: patches is .*the first that is compared"):
        compiled_policy.export(tmp_path / "policy", precision="bfloat16")
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
        samples = evla.runtime.load(tmp_path / "policy", threads=1).sample(**case.inputs)
        assert relative_error(samples, case.outputs["samples"]) < 1e-5
