"""Exported policies on ONNX Runtime against CogACT's golden data, the dense policy and the compiled graph."""

import shutil
from collections.abc import Callable, Iterator
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import onnx
import onnxruntime
import openvino
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

import evla_compile as evla
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.exporters import onnx_weights
from evla_compile.exporters.onnx_weights import save
from evla_compile.exporters.to_onnx import to_model, to_onnx
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.inputs import GraphInputs, InputSignature
from evla_compile.runtime import RuntimePolicy
from evla_compile.scratch import scratch
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.tolerances import TOLERANCES, check
from tests.paper_config import paper_config

INSTRUCTIONS = ("open the top drawer", "move sponge near apple", "move blue plastic bottle near pepsi can")
PATCH_SETS = {"key": "key_patches", "task": "task_patches", "diverse": "diverse_patches", "keep": "kept_patches"}
SELECTION = tuple(PATCH_SETS.values())
DENSE_STAGES = ("patches", "projected", "cognition")


class Exported(NamedTuple):
    compiled: CompiledPolicy
    runtime: RuntimePolicy
    folder: Path


Export: TypeAlias = Callable[..., Exported]


@pytest.fixture(scope="module")
def export(tiny_policy: CogACT, tmp_path_factory: pytest.TempPathFactory) -> Export:
    """Compile, export and load once for each choice of settings."""
    exported: dict[object, Exported] = {}

    def make(config: CompileConfig, *stages: str) -> Exported:
        if (config, stages) not in exported:
            compiled = evla.compile(tiny_policy, config)
            folder = tmp_path_factory.mktemp("exported") / "artifact"
            compiled.export(folder, stages=stages)
            exported[config, stages] = Exported(compiled, evla.runtime.load(folder, threads=1), folder)
        return exported[config, stages]

    return make


@pytest.fixture(scope="module")
def other_frame(frame: Image.Image) -> Image.Image:
    return frame.crop((0, 0, 240, 200)).transpose(Image.Transpose.FLIP_LEFT_RIGHT)


def efficient_config(case: dict[str, Any], **settings: Any) -> CompileConfig:
    return paper_config(
        keep_layers=tuple(case["kept_layers"]),
        mlp_keep=1.0,
        visual_tokens=case.get("visual_tokens"),
        key_tokens=case.get("key_tokens", 4),
        task_share=case.get("alpha", 0.5),
        cache_interval=case.get("cache_interval", 1),
        ddim_steps=case["steps"],
        cfg_scale=case["cfg"],
        **settings,
    )


def golden_inputs(policy: CogACT, frame: Image.Image, case: dict[str, Any], file: Path) -> dict[str, Any]:
    ids, length = policy.processor.text(case["instruction"], 32)
    return {
        "image": policy.processor.image(frame)[None],
        "input_ids": ids[None],
        "text_length": np.array([length]),
        "noise": np.load(file)["noise"].astype(np.float32).reshape(1, 16, 7),
    }


@pytest.mark.parametrize("number", range(3))
def test_dense_export_equals_public_cogact(
    number: int, export: Export, tiny_policy: CogACT, golden: dict[str, Any], golden_dir: Path, frame: Image.Image
) -> None:
    case = golden["cases"][number]
    config = CompileConfig.dense(ddim_steps=case["num_ddim_steps"], cfg_scale=case["cfg_scale"])
    stages = DENSE_STAGES if number == 0 else ("cognition",)
    expected = np.load(golden_dir / case["file"])
    inputs = golden_inputs(tiny_policy, frame, case, golden_dir / case["file"])
    compiled, runtime, _ = export(config, *stages)
    for found in (compiled.outputs(**inputs, stages=("samples", *stages)), runtime.outputs(**inputs)):
        check("samples", found["samples"], expected["samples"], tolerance=TOLERANCES.samples)
        check("cognition", found["cognition"].ravel(), expected["cognition"].ravel(), tolerance=TOLERANCES.cognition)
        if number == 0:
            check("patches", found["patches"], expected["vision_patches"], tolerance=TOLERANCES.patches)
            check("projected", found["projected"], expected["projected"], tolerance=TOLERANCES.projected)
    for policy in (compiled, runtime):
        actions = policy.predict_action(frame, case["instruction"], case["unnorm_key"], noise=inputs["noise"][0])
        check("actions", actions, expected["actions"].reshape(16, 7), tolerance=TOLERANCES.actions)


@pytest.mark.parametrize("number", range(6))
def test_compiled_export_equals_the_reference_of_the_method(
    number: int, export: Export, tiny_policy: CogACT, golden: dict[str, Any], golden_dir: Path, frame: Image.Image
) -> None:
    efficient = golden["efficient"][number]
    case = golden["cases"][efficient["case"]]
    expected = np.load(golden_dir / efficient["file"])
    inputs = golden_inputs(tiny_policy, frame, case, golden_dir / case["file"])
    stages = ("cognition", *(SELECTION if "visual_tokens" in efficient else ()))
    compiled, runtime, _ = export(efficient_config(efficient), *stages)
    for found in (compiled.outputs(**inputs, stages=("samples", *stages)), runtime.outputs(**inputs)):
        check("samples", found["samples"], expected["samples"], tolerance=TOLERANCES.samples)
        check("cognition", found["cognition"].ravel(), expected["cognition"].ravel(), tolerance=TOLERANCES.cognition)
        if "visual_tokens" in efficient:
            for key, stage in PATCH_SETS.items():
                assert set(found[stage].ravel().tolist()) == set(expected[key].ravel().tolist()), stage
            assert found["kept_patches"].ravel().tolist() == sorted(expected["keep"].ravel().tolist())


@pytest.mark.parametrize("batch", [1, 2])
def test_dense_export_equals_the_dense_policy(
    batch: int, export: Export, tiny_policy: CogACT, frame: Image.Image, other_frame: Image.Image
) -> None:
    _, runtime, _ = export(CompileConfig.dense(batch_size=batch), *(DENSE_STAGES if batch == 1 else ()))
    for inputs in observations(tiny_policy, (frame, other_frame), batch):
        expected = tiny_policy.sample(*map(torch.from_numpy, inputs.arrays)).numpy()
        check("samples", runtime.sample(*inputs.arrays), expected, tolerance=TOLERANCES.lowered)


@pytest.mark.parametrize("batch", [1, 2])
def test_compiled_export_equals_the_compiled_graph(
    batch: int,
    export: Export,
    tiny_policy: CogACT,
    golden: dict[str, Any],
    frame: Image.Image,
    other_frame: Image.Image,
) -> None:
    stages = ("cognition", *SELECTION) if batch == 1 else ()
    compiled, runtime, _ = export(efficient_config(golden["efficient"][5], batch_size=batch), *stages)
    for inputs in observations(tiny_policy, (frame, other_frame), batch):
        check("samples", runtime.sample(*inputs.arrays), compiled.sample(*inputs.arrays), tolerance=TOLERANCES.lowered)


def observations(policy: CogACT, frames: tuple[Image.Image, Image.Image], batch: int) -> Iterator[GraphInputs]:
    """Yield two frames with three instructions each; further rows of a batch hold other observations."""
    pairs = list(product(frames, INSTRUCTIONS))
    for number, first in enumerate(pairs):
        images, texts = zip(*[first, pairs[number - 2]][:batch], strict=True)
        signature = InputSignature.of(policy.sizes, batch_size=batch, text_tokens=32)
        yield GraphInputs.prepare(policy.processor, images, texts, signature, seed=number)


def test_deleted_layers_are_gone_from_the_file(tiny_policy: CogACT, export: Export, golden: dict[str, Any]) -> None:
    dense = export(CompileConfig.dense(), *DENSE_STAGES).folder / "model.onnx"
    pruned = export(efficient_config(golden["efficient"][0]), "cognition").folder / "model.onnx"
    removed = tiny_policy.sizes.language.layers - len(golden["efficient"][0]["kept_layers"])
    parameters = tiny_policy.get_submodule("llm_backbone.llm.model.layers.0").parameters()
    layer = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    assert dense.stat().st_size - pruned.stat().st_size >= removed * layer
    sizes = {
        file: sum(numpy_helper.to_array(w).nbytes for w in onnx.load(file).graph.initializer)
        for file in (dense, pruned)
    }
    assert sizes[dense] - sizes[pruned] == pytest.approx(removed * layer, abs=200)  # shapes are initializers too


def test_every_export_verifies(export: Export, golden: dict[str, Any], tmp_path: Path) -> None:
    compiled, _, _ = export(efficient_config(golden["efficient"][5]), "cognition", *SELECTION)
    compiled.export(tmp_path / "policy.onnx", opset=20)
    found = evla.verify(tmp_path / "policy.onnx", threads=1)
    assert dict(found.errors).keys() == {"samples"}
    assert found.nodes > 100
    assert onnx.load(tmp_path / "policy.onnx").ir_version == 9
    assert "Attention" not in {node.op_type for node in onnx.load(tmp_path / "policy.onnx").graph.node}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "policy.cases.npz",
        "policy.manifest.json",
        "policy.onnx",
        "policy.report.json",
        "policy.tokenizer.json",
    ]


@pytest.mark.parametrize(("opset", "ir_version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 10)])
def test_the_ir_version_is_one_that_the_oldest_runtimes_of_the_opset_read(opset: int, ir_version: int) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.aten.relu.default, (x,))
    graph.output((y,))
    with FakeTensorMode():
        x.meta["val"] = y.meta["val"] = torch.empty(2, 3)
    model = to_model(fx.GraphModule(torch.nn.Module(), graph), outputs=["y"], opset=opset)
    assert (model.opset_imports[""], model.ir_version) == (opset, ir_version)


def test_openvino_runs_the_export(
    tiny_policy: CogACT, export: Export, golden: dict[str, Any], frame: Image.Image, other_frame: Image.Image
) -> None:
    """A second consumer: OpenVINO reads opset 23 with its fused attention, and agrees."""
    compiled, _, folder = export(efficient_config(golden["efficient"][5]), "cognition", *SELECTION)
    # CPUs with 16-bit units are given 16-bit products unless told otherwise.
    consumer = openvino.Core().compile_model(folder / "model.onnx", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for inputs in observations(tiny_policy, (frame, other_frame), 1):
        found = consumer(inputs.by_name)["samples"]
        check("samples", found, compiled.sample(*inputs.arrays), tolerance=TOLERANCES.second_consumer)


def test_export_carries_no_local_path_and_names_modules(export: Export) -> None:
    file = export(CompileConfig.dense(), *DENSE_STAGES).folder / "model.onnx"
    model = onnx.load(file)
    props = {prop.key: prop.value for node in model.graph.node for prop in node.metadata_props}
    assert set(props) == {"module", "pass"}
    modules = {prop.value for node in model.graph.node for prop in node.metadata_props if prop.key == "module"}
    assert {prop.value for node in model.graph.node for prop in node.metadata_props if prop.key == "pass"} == {
        *("UnrollDiffusion", "NarrowLastLayer")
    }
    assert all(node.name.startswith(f"{prop.value}/") for node in model.graph.node for prop in node.metadata_props[:1])
    assert len({node.name for node in model.graph.node}) == len(model.graph.node)
    assert "llm_backbone.llm.model.layers.5.self_attn" in modules
    assert str(Path(__file__).parents[2]).encode() not in file.read_bytes()


def test_large_weights_go_to_external_data(
    export: Export, tiny_policy: CogACT, frame: Image.Image, tmp_path: Path
) -> None:
    compiled, _, _ = export(CompileConfig.dense(), *DENSE_STAGES)
    to_onnx(compiled.graph, tmp_path / "model.onnx", outputs=["samples"], external_data_bytes=1_000_000)
    weight_bytes = compiled.report.passes[-1].after.weight_bytes
    assert (tmp_path / "model.onnx.data").stat().st_size > 0.9 * weight_bytes
    assert (tmp_path / "model.onnx").stat().st_size < 3_000_000
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    inputs = next(observations(tiny_policy, (frame, frame), 1))
    (found,) = session.run(["samples"], inputs.by_name)
    check("samples", found, compiled.sample(*inputs.arrays), tolerance=TOLERANCES.lowered)


def test_weights_are_read_only_when_they_are_written(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, _, _ = export(CompileConfig.dense(), *DENSE_STAGES)
    read: list[str] = []
    original = onnx_weights._read

    def recording(tensor: Tensor, name: str, permutation: tuple[int, ...]) -> Any:
        read.append(name)
        return original(tensor, name, permutation)

    monkeypatch.setattr(onnx_weights, "_read", recording)
    model = to_model(compiled.graph, outputs=["samples"])
    assert read == []
    sizes: list[int] = []
    save(model, tmp_path / "model.onnx", external=True, wrote=sizes.append)
    assert len(read) == len(set(read)) > 100
    assert sum(sizes) == pytest.approx(compiled.report.passes[-1].after.weight_bytes, rel=0.01)


def test_an_interrupted_export_leaves_what_was_there(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, _, _ = export(CompileConfig.dense(), *DENSE_STAGES)
    compiled.export(tmp_path / "policy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()}
    original, calls = onnx_weights._read, count()

    def interrupted(tensor: Tensor, name: str, permutation: tuple[int, ...]) -> Any:
        if next(calls) == 50:
            raise KeyboardInterrupt
        return original(tensor, name, permutation)

    monkeypatch.setattr(onnx_weights, "_read", interrupted)
    for target in ("policy", "other"):
        with pytest.raises(KeyboardInterrupt):
            compiled.export(tmp_path / target)
        calls = count()
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "policy").iterdir()} == before


def test_a_full_disk_is_refused_before_anything_is_written(
    export: Export, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled, _, _ = export(CompileConfig.dense(), *DENSE_STAGES)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100_500_000))
    with pytest.raises(evla.ArtifactError, match=r"policy needs [0-9.]+ MB, and .* has 100\.5 MB free: make room"):
        compiled.export(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []
    refused = pytest.raises(evla.ArtifactError, match=r"other exports to it are writing \.policy\.partial-[0-9a-f]{8}$")
    with scratch(tmp_path / "policy"), refused:
        compiled.export(tmp_path / "policy")
    assert list(tmp_path.iterdir()) == []


def test_export_refuses_what_it_cannot_write(export: Export, tmp_path: Path) -> None:
    compiled, _, _ = export(CompileConfig.dense(), *DENSE_STAGES)
    with pytest.raises(evla.ArtifactError, match=r"ends in \.onnx or \.engine"):
        compiled.export(tmp_path / "policy.plan")
    with pytest.raises(ValueError, match="opset=24: expected one from 18 to 23"):
        compiled.export(tmp_path / "policy.onnx", opset=24)
    with pytest.raises(evla.PassError, match="no stage 'kept_patches'"):
        compiled.export(tmp_path / "policy.onnx", stages=("kept_patches",))
    assert list(tmp_path.iterdir()) == []
