"""Engines for whole policies, built for real by TensorRT-RTX on the CPU, and their entry in the manifest."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

import evla_compile as evla
from evla_compile.artifact.files import check_files
from evla_compile.artifact.manifest import Manifest, read_manifest
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.demo.demo import DEMO_CONFIG
from evla_compile.demo.shipped_policy import DEMO_POLICY, calibration_frames
from evla_compile.errors import ArtifactError, EvlaError, ExportError
from evla_compile.estimate.estimates import skeleton
from evla_compile.exporters.build import build_engine
from evla_compile.exporters.onnx_weights import weight_bytes
from evla_compile.exporters.split import split
from evla_compile.exporters.to_onnx import to_model
from evla_compile.exporters.to_tensorrt import to_tensorrt
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.plan import Plan, stand_in_plan
from evla_compile.settings.precision import Precision
from evla_compile.settings.sizes import published_sizes
from tests.paper_config import paper_config

trt = pytest.importorskip("tensorrt_rtx", reason="needs tensorrt-rtx-cu13, which has wheels for x86-64 alone")
GPUS = ("8.6", "8.9", "12.0")
RTX = EngineSettings(flavour="tensorrt_rtx", compute_capabilities=GPUS)
aten = torch.ops.aten


@pytest.fixture(scope="module")
def demo() -> CogACT:
    """The demo's policy."""
    return evla.load(DEMO_POLICY)


@pytest.fixture(scope="module")
def plan(demo: CogACT) -> Plan:
    return evla.calibrate(demo, calibration_frames(), DEMO_CONFIG, progress=False)


@pytest.fixture(scope="module")
def compiled(demo: CogACT, plan: Plan) -> CompiledPolicy:
    return evla.compile(demo, DEMO_CONFIG, calibration=calibration_frames(), plan=plan)


@pytest.fixture(scope="module")
def by_relevance(demo: CogACT) -> CompiledPolicy:
    """The demo's policy with a selection that rounding to bfloat16 hardly changes."""
    config = paper_config(keep_layers=10, layer_rule="greedy", visual_tokens=28, key_tokens=2)
    return evla.compile(demo, config, calibration=calibration_frames()[::14], progress=False)


@pytest.fixture(scope="module")
def artifact(compiled: CompiledPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "policy"
    compiled.export(folder)
    build_engine(folder, RTX, progress=False)
    return folder


def parsed(model: Path) -> Any:
    """Parse a file by a builder of the test's own."""
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    assert parser.parse_from_file(str(model))
    return builder, network, parser


def check_engines(folder: Path, graphs: int = 1) -> Manifest:
    """Hold an artifact's engines against what a builder of the test's own makes of its graphs."""
    manifest = read_manifest(folder / "manifest.json")
    check_files(manifest.files, folder)
    engine = manifest.engine
    assert engine is not None
    assert len(engine.files) == graphs
    assert engine.compute_capabilities == GPUS
    assert engine.version == trt.__version__
    for part, layers, file in zip(manifest.parts, engine.layers, engine.files, strict=True):
        builder, network, parser = parsed(folder / part.model.name)
        assert layers == network.num_layers > len(onnx.load(folder / part.model.name).graph.node)
        tensors = [network.get_input(i) for i in range(network.num_inputs)]
        tensors += [network.get_output(i) for i in range(network.num_outputs)]
        found = {(tensor.name, tuple(tensor.shape)) for tensor in tensors}
        assert found == {(spec.name, spec.shape) for spec in (*part.inputs, *part.outputs)}
        assert file.size > 0.5 * sum(record.size for record in part.files)
        del parser, network, builder
    return manifest


def test_the_compiled_demo_policy_for_three_gpus_in_one_engine(artifact: Path) -> None:
    manifest = check_engines(artifact)
    assert [record.name for record in manifest.files] == [
        *("model.onnx", "model.engine", "tokenizer.json", "report.json", "plan.safetensors", "cases.npz")
    ]
    assert manifest.engine is not None
    assert manifest.engine.gpu is None
    assert sorted(path.name for path in artifact.iterdir()) == sorted(
        [*(record.name for record in manifest.files), "manifest.json"]
    )


def test_the_dense_demo_policy(demo: CogACT, tmp_path: Path, artifact: Path) -> None:
    evla.compile(demo, CompileConfig.dense()).export(tmp_path / "policy")
    build_engine(tmp_path / "policy", RTX, progress=False)
    dense, compiled = check_engines(tmp_path / "policy").engine, read_manifest(artifact / "manifest.json").engine
    assert dense is not None
    assert compiled is not None
    assert dense.layers[0] > 1.5 * compiled.layers[0]


def test_a_batch_of_two(demo: CogACT, plan: Plan, tmp_path: Path) -> None:
    config = replace(DEMO_CONFIG, batch_size=2)
    evla.compile(demo, config, plan=plan).export(tmp_path / "policy.engine", engine=RTX, progress=False)
    manifest = read_manifest(tmp_path / "policy.manifest.json")
    assert [str(spec) for spec in manifest.parts[0].inputs] == [
        *("image uint8[2, 112, 112, 3]", "input_ids int64[2, 32]", "text_length int64[2]", "noise float32[2, 16, 7]")
    ]
    assert manifest.engine is not None
    check_files(manifest.files, tmp_path)
    assert {"policy.onnx", "policy.engine", "policy.manifest.json"} < {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_half_precision_with_a_float32_head(
    precision: Precision, compiled: CompiledPolicy, by_relevance: CompiledPolicy, artifact: Path, tmp_path: Path
) -> None:
    """A strongly typed network obeys the casts: products outside the head read half precision, the head float32."""
    if precision == "bfloat16":
        compiled, artifact = by_relevance, tmp_path / "whole"
        compiled.export(artifact)
        build_engine(artifact, RTX, progress=False)
    compiled.export(tmp_path / "policy", precision=precision)
    build_engine(tmp_path / "policy", RTX, progress=False)
    manifest, whole = check_engines(tmp_path / "policy"), read_manifest(artifact / "manifest.json")
    assert manifest.engine is not None
    assert whole.engine is not None
    outside_the_head = sum(
        weight.nbytes for name, weight in compiled.graph.named_buffers() if not name.startswith("action_model.")
    )
    saved = whole.engine.files[0].size - manifest.engine.files[0].size
    assert 0.85 < saved / (outside_the_head / 2) < 1.02
    builder, network, parser = parsed(tmp_path / "policy" / "model.onnx")
    half = trt.DataType.HALF if precision == "float16" else trt.DataType.BF16
    found: dict[bool, set[Any]] = {True: set(), False: set()}
    for index in range(network.num_layers):
        layer = network.get_layer(index)
        if layer.type == trt.LayerType.MATRIX_MULTIPLY and not layer.name.startswith(("select_tokens/", "ONNXTRT")):
            found[layer.name.startswith(("denoising.", "action_model."))].add(layer.get_input(0).dtype)
    assert found == {True: {trt.DataType.FLOAT}, False: {half}}
    del parser, network, builder


def test_perception_and_action_apart(by_relevance: CompiledPolicy, tmp_path: Path) -> None:
    by_relevance.export(tmp_path / "policy", parts=2, precision="bfloat16")
    build_engine(tmp_path / "policy", RTX, progress=False)
    manifest = check_engines(tmp_path / "policy", graphs=2)
    assert [record.name for record in manifest.engine.files] == [  # type: ignore[union-attr]  # checked above
        *("model.perception.engine", "model.action.engine")
    ]


def test_the_action_head_of_cogact_base_at_full_size(tmp_path: Path) -> None:
    """DiT-B, 12 blocks of width 768, ten steps of which two compute them; random weights."""
    sizes = published_sizes("base")
    sizes = replace(sizes, language=replace(sizes.language, layers=3, vocabulary=64))
    config = replace(CompileConfig.dense(), cache_interval=5)
    policy = skeleton(sizes, dtype=torch.float32)
    graph = evla.compile(policy, config, plan=stand_in_plan(sizes, config)).graph
    _, action = split(graph, ("samples",), 2)
    model = to_model(action.graph, inputs=action.inputs, outputs=action.outputs)
    _fill(model)
    assert weight_bytes(model) > 4 * 88_000_000
    ir.save(model, tmp_path / "dit.onnx")
    built = to_tensorrt(tmp_path / "dit.onnx", tmp_path / "dit.engine", RTX)
    assert [str(spec) for spec in built.inputs] == [
        "noise float32[1, 16, 7]",
        f"{action.inputs[1]} float32[1, 1, 4096]",
    ]
    assert [str(spec) for spec in built.outputs] == ["samples float32[1, 16, 7]"]
    attentions = sum(node.target == aten.scaled_dot_product_attention.default for node in action.graph.graph.nodes)
    assert attentions == 2 * sizes.action.depth == built.attentions
    assert (tmp_path / "dit.engine").stat().st_size > 4 * 88_000_000


def _fill(model: ir.Model) -> None:
    """Give a model that was made without weights seeded random ones."""
    draw = np.random.Generator(np.random.PCG64(0))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor):
            random = 0.02 * draw.standard_normal(tuple(tensor.shape.numpy()), dtype=np.float32)
            value.const_value = ir.tensor(np.float32(random), name=tensor.name)


def test_a_second_build_is_the_same_and_not_slower(artifact: Path, tmp_path: Path) -> None:
    """TensorRT-RTX keeps no timings when it builds (its timing cache does nothing), and needs none: byte for byte."""
    times = []
    for number in range(3):
        start = perf_counter()
        to_tensorrt(artifact / "model.onnx", tmp_path / f"{number}.engine", RTX)
        times.append(perf_counter() - start)
    first = (artifact / "model.engine").read_bytes()
    assert all((tmp_path / f"{number}.engine").read_bytes() == first for number in range(3))
    assert median(times[1:]) < 1.5 * times[0]


def test_another_build_replaces_the_engine_and_its_entry(artifact: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(artifact)
    before = read_manifest(folder / "manifest.json")
    build_engine(folder, replace(RTX, compute_capabilities=("8.9",)), progress=False)
    after = read_manifest(folder / "manifest.json")
    check_files(after.files, folder)
    assert after.engine is not None
    assert after.engine.compute_capabilities == ("8.9",)
    assert after.engine.files != before.engine.files  # type: ignore[union-attr]  # the fixture builds one
    assert replace(after, engine=None) == replace(before, engine=None)


# Refusals


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    def copy(folder: Path) -> Path:
        subprocess.run(["/bin/cp", "-r", str(folder), str(tmp_path / "copy")], check=True)
        return tmp_path / "copy"

    return copy


def test_a_changed_graph_is_refused_before_it_is_built(artifact: Path, copied: Callable[[Path], Path]) -> None:
    folder = copied(artifact)
    with (folder / "model.onnx").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x07")
    with pytest.raises(ArtifactError, match=r"model\.onnx has the SHA-256"):
        build_engine(folder, RTX, progress=False)


def test_a_build_that_fails_leaves_all_as_it_was(
    artifact: Path, copied: Callable[[Path], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied(artifact)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(trt.Builder, "build_serialized_network", lambda self, network, config: None)
    with pytest.raises(ExportError, match=r"TensorRT-RTX cannot build model\.onnx: it gave no reason"):
        build_engine(folder, RTX, progress=False)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_too_little_memory_is_refused_before_any_part_is_built(artifact: Path) -> None:
    with pytest.raises(EvlaError, match=r"building model\.onnx takes about .* in more parts"):
        build_engine(artifact, replace(RTX, memory_bytes=500_000_000), progress=False)


def test_too_little_disk_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ArtifactError, match=r"engines for .* take about [0-9.]+ MB, and 1\.0 kB are free"):
        build_engine(artifact, RTX, progress=False)


def test_an_engine_on_a_machine_without_gpu_is_said_to_need_one(artifact: Path) -> None:
    """What a user of this machine sees, who asks for the engine here."""
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(EvlaError, match="TensorRT-RTX runs engines on a GPU, and this machine shows none"):
        evla.runtime.load(artifact, "engine")


def test_tensorrt_without_gpu_is_refused(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cuda.bindings.runtime", reason="needs cuda-bindings")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    monkeypatch.setitem(sys.modules, "tensorrt", trt)
    monkeypatch.setattr(trt, "__version__", "10.13.0")
    with pytest.raises(EvlaError, match="builds engines on the GPU that is to run them, and this machine shows none"):
        build_engine(artifact, EngineSettings(flavour="tensorrt"), progress=False)


def test_engine_settings_belong_to_an_engine(compiled: CompiledPolicy, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected a target that ends in \.engine"):
        compiled.export(tmp_path / "policy", engine=RTX)


def test_a_missing_library_is_said_before_anything_is_exported(
    compiled: CompiledPolicy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(EvlaError, match=r"TensorRT-RTX cannot be imported .*evla-compile\[rtx\]"):
        compiled.export(tmp_path / "policy.engine", engine=RTX)
    assert not list(tmp_path.iterdir())
