"""The static-shape proof and the verification of artifacts."""

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import evla_compile as evla
from evla_compile.artifact.cases import read_cases
from evla_compile.artifact.files import check_files
from evla_compile.artifact.manifest import read_manifest, write_manifest
from evla_compile.artifact.records import FileRecord, TensorSpec
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.exporters.stage_run import StageRun
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.runtime import Provider
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.precision import Precision
from evla_compile.verification import verify as verification
from evla_compile.verification.verify import prove_static_shapes, prove_static_shapes_of


def write_model(path: Path, nodes: list[onnx.NodeProto], size: int | str = 4, weights: tuple[int, ...] = ()) -> Path:
    """Write a graph x [size,3] -> y with unknown output shape."""
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [size, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 12])],
        initializer=[numpy_helper.from_array(np.array(weights, dtype=np.int64), "shape")] if weights else [],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)]), path)
    return path


def test_static_shapes_are_proven(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Reshape", ["r", "shape"], ["y"])]
    assert prove_static_shapes(write_model(tmp_path / "m.onnx", nodes, weights=(1, 12))) == 2


def test_dynamic_input_fails_the_proof(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Reshape", ["r", "shape"], ["y"])]
    path = write_model(tmp_path / "m.onnx", nodes, size="batch", weights=(1, 12))
    with pytest.raises(evla.VerificationError, match="x has a dynamic shape"):
        prove_static_shapes(path)


def test_a_size_of_0_fails_the_proof(tmp_path: Path) -> None:
    """Exporters write 0 where a size is not known; no value of a policy is empty."""
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Constant", [], ["y"], value_floats=[0.0] * 12)]
    model = onnx.load(write_model(tmp_path / "m.onnx", nodes, size=0))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [12]))
    with pytest.raises(evla.VerificationError, match="x has a dynamic shape"):
        prove_static_shapes_of(model, "m.onnx")
    model.graph.input[0].CopyFrom(helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3]))
    assert prove_static_shapes_of(model, "m.onnx") == 2


def test_inner_data_dependent_shape_fails_the_proof(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="search"),
        helper.make_node("Cast", ["where"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["cast"], ["sum"], keepdims=1),
        helper.make_node("Expand", ["sum", "shape"], ["y"]),
    ]
    with pytest.raises(evla.VerificationError, match="NonZero node 'search' has a dynamic shape"):
        prove_static_shapes(write_model(tmp_path / "m.onnx", nodes, weights=(1, 12)))


def test_shape_that_a_file_only_claims_fails_the_proof(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("NonZero", ["x"], ["where"], name="search"),
        helper.make_node("Cast", ["where"], ["cast"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["cast"], ["sum"], keepdims=1),
        helper.make_node("Expand", ["sum", "shape"], ["y"]),
    ]
    model = onnx.load(write_model(tmp_path / "m.onnx", nodes, weights=(1, 12)))
    model.graph.value_info.extend(
        helper.make_tensor_value_info(n, TensorProto.FLOAT, [2, 2]) for n in ("where", "cast")
    )
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(evla.VerificationError, match="NonZero"):
        prove_static_shapes(tmp_path / "m.onnx")


def test_a_dtype_that_there_is_not_fails_the_proof(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["r"]), helper.make_node("Reshape", ["r", "shape"], ["y"])]
    model = onnx.load(write_model(tmp_path / "m.onnx", nodes, weights=(1, 12)))
    model.graph.initializer[0].data_type = 99
    onnx.save(model, tmp_path / "m.onnx")
    with pytest.raises(evla.VerificationError, match=r"m\.onnx: its shapes cannot be inferred: .*99"):
        prove_static_shapes(tmp_path / "m.onnx")


def test_an_operator_that_chooses_by_data_fails_the_proof_though_its_shapes_are_static(tmp_path: Path) -> None:
    branches = {}
    for branch in ("then_branch", "else_branch"):
        node = helper.make_node("Constant", [], [branch], value_floats=[0.0] * 12)
        output = helper.make_tensor_value_info(branch, TensorProto.FLOAT, [12])
        branches[branch] = helper.make_graph([node], branch, [], [output])
    nodes = [
        helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        helper.make_node("Cast", ["sum"], ["chosen"], to=TensorProto.BOOL),
        helper.make_node("If", ["chosen"], ["y"], name="choose", **branches),
    ]
    model = onnx.load(write_model(tmp_path / "m.onnx", nodes))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, [12]))
    with pytest.raises(evla.VerificationError, match=r"m: If node 'choose' has a dynamic shape in \['y'\]"):
        prove_static_shapes_of(model, "m")


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (TensorProto.FLOAT, "float32"),
        (TensorProto.DOUBLE, "float64"),
        (TensorProto.FLOAT16, "float16"),
        (TensorProto.BOOL, "bool"),
        (TensorProto.INT64, "int64"),
        (TensorProto.UINT8, "uint8"),
    ],
)
def test_a_value_of_a_graph_is_described_as_the_manifest_does(kind: int, dtype: str) -> None:
    value = helper.make_tensor_value_info("x", kind, [1, 3])
    assert verification._describe(value) == str(TensorSpec(name="x", dtype=dtype, shape=(1, 3)))


@pytest.fixture(scope="module")
def dense(tiny_policy: CogACT) -> CompiledPolicy:
    return evla.compile(tiny_policy, CompileConfig.dense(ddim_steps=1))


@pytest.fixture(scope="module")
def artifact(dense: CompiledPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("verify") / "artifact"
    dense.export(folder)
    return folder


@pytest.fixture
def copy(artifact: Path, tmp_path: Path) -> Path:
    shutil.copytree(artifact, tmp_path / "copy")
    return tmp_path / "copy"


def test_artifact_verifies(artifact: Path) -> None:
    found = evla.verify(artifact, threads=1)
    assert found.cases == 2
    ((name, error),) = found.errors
    assert name == "samples"
    assert 0 < error < 1e-5


def test_what_the_runtime_returns_is_compared_too(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The graphs are right; only the runtime's outputs are not."""

    def load(*arguments: object, **options: object) -> SimpleNamespace:
        assert arguments == (artifact, None, 1)
        assert options == {"check_hashes": False, "mapped": True}  # hashed a moment ago: gigabytes at full size
        policy = evla.runtime.load(artifact, threads=1)
        return SimpleNamespace(outputs=lambda *arrays: {"samples": policy.outputs(*arrays)["samples"] * factor})

    factor = np.float32(1.00003)
    monkeypatch.setattr(verification, "load", load)
    ((name, error),) = evla.verify(artifact, threads=1).errors
    assert name == "samples"
    assert error == pytest.approx(3e-5, rel=0.2)
    factor = np.float32(1.1)
    with pytest.raises(evla.VerificationError, match=r"artifact in the runtime: samples is 1\.00e-01 of its largest"):
        evla.verify(artifact, threads=1)


@pytest.mark.parametrize(
    ("name", "provider", "mapped"),
    [("", "cpu", True), ("", "openvino", False), ("model.engine", None, False), ("model.engine", "cpu", True)],
)
def test_weights_are_mapped_on_a_cpu_alone(
    name: str, provider: Provider | None, mapped: bool, copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*arguments: object, **options: object) -> NoReturn:
        raise evla.EvlaError(f"asked for {arguments[1]}, mapped={options['mapped']}")

    monkeypatch.setattr(verification, "load", load)
    monkeypatch.setattr(verification, "replay_graphs", lambda *_, **__: {"samples": 0.0})
    if name:
        (copy / "manifest.json").rename(copy / "model.manifest.json")
        (copy / name).touch()
    with pytest.raises(evla.EvlaError, match=f"asked for {provider}, mapped={mapped}"):
        evla.verify(copy / name, threads=1, provider=provider)


def accept_model(folder: Path, precision: Precision = "float32") -> None:
    """Make the manifest of `folder` agree with its changed graph."""
    manifest = read_manifest(folder / "manifest.json")
    (part,) = manifest.parts
    part = replace(part, model=FileRecord.measure(folder / part.model.name))
    manifest = replace(manifest, parts=(part,), precision=precision)
    write_manifest(manifest, folder / "manifest.json")
    check_files(read_manifest(folder / "manifest.json").files, folder)


def test_changed_weight_fails_on_its_hash(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    change_a_weight(model)
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(evla.ArtifactError, match=r"model\.onnx"):
        evla.verify(copy)


def test_changed_weight_with_a_matching_hash_fails_on_the_recorded_cases(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    change_a_weight(model)
    onnx.save(model, copy / "model.onnx")
    accept_model(copy)
    with pytest.raises(evla.VerificationError, match=r"copy on ONNX Runtime: samples is 3.*first stage to leave it"):
        evla.verify(copy, threads=1)


def change_a_weight(model: onnx.ModelProto, by: float = 1.0) -> None:
    weight = next(w for w in model.graph.initializer if w.name.endswith("final_layer.linear.bias"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(by), weight.name))


def test_weights_in_a_file_that_the_manifest_does_not_list_are_refused(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    onnx.save(model, copy / "model.onnx", save_as_external_data=True, location="hidden.bin", size_threshold=1024)
    accept_model(copy)
    with pytest.raises(evla.ArtifactError, match=r"keeps weights in \['hidden.bin'\], its manifest lists \[\]"):
        evla.verify(copy, threads=1)


def test_an_embedding_of_other_rows_than_the_manifest_s_is_refused(copy: Path) -> None:
    manifest = read_manifest(copy / "manifest.json")
    write_manifest(replace(manifest, vocabulary=manifest.vocabulary + 1), copy / "manifest.json")
    with pytest.raises(evla.VerificationError, match="the token embedding has 32064 rows, 32065 by the manifest"):
        evla.verify(copy, threads=1)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_renamed_output_is_refused_in_every_precision(precision: Precision, copy: Path) -> None:
    """Before anything runs: float32 arithmetic would find no difference in a bfloat16 file either."""
    model = onnx.load(copy / "model.onnx")
    rename(model, "samples", "actions")
    onnx.save(model, copy / "model.onnx")
    accept_model(copy, precision)
    with pytest.raises(
        evla.VerificationError, match=r"outputs are actions float32\[1, 16, 7\]: expected samples float32"
    ):
        evla.verify(copy, threads=1)


def test_a_renamed_stage_is_refused(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    rename(model, "projected", "elsewhere")
    onnx.save(model, copy / "model.onnx")
    accept_model(copy)
    with pytest.raises(evla.VerificationError, match="no graph has the recorded stages projected"):
        evla.verify(copy, threads=1)


def rename(model: onnx.ModelProto, old: str, new: str) -> None:
    """Rename a value of a graph everywhere."""
    renamed = 0
    for node in model.graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
                    renamed += 1
    for output in model.graph.output:
        output.name = new if output.name == old else output.name
    assert renamed


def test_a_value_that_is_not_a_number_is_a_difference(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    change_a_weight(model, float("nan"))
    onnx.save(model, copy / "model.onnx")
    accept_model(copy)
    message = (
        r"copy on ONNX Runtime: samples cannot be compared: \d+ of its 112 values are .*not a number: do not deploy"
    )
    with pytest.raises(evla.VerificationError, match=message):
        evla.verify(copy, threads=1)


def test_a_graph_that_onnx_runtime_refuses_is_an_artifact_error(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    model.ir_version = 99
    onnx.save(model, copy / "model.onnx")
    with pytest.raises(evla.ArtifactError, match=r"cannot load .*model\.onnx: .*another opset would not help"):
        StageRun(read_manifest(copy / "manifest.json"), copy, (), threads=1)


def test_an_input_that_onnx_runtime_refuses_is_a_verification_error(artifact: Path) -> None:
    manifest = read_manifest(artifact / "manifest.json")
    (case, *_) = read_cases(artifact / "cases.npz", manifest)
    graphs = StageRun(manifest, artifact, (), threads=1)
    with pytest.raises(evla.VerificationError, match=r"ONNX Runtime failed on .*model\.onnx: .*idx=99999"):
        graphs.run(replace(case.inputs, input_ids=np.full((1, 32), 99_999)))


@pytest.mark.parametrize("content", [b"", b"no graph", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"])
def test_a_file_that_is_no_graph_is_refused(content: bytes, copy: Path) -> None:
    (copy / "model.onnx").write_bytes(content)
    accept_model(copy)
    with pytest.raises(evla.ArtifactError, match=r"model\.onnx is no ONNX file"):
        evla.verify(copy, threads=1)


def test_a_graph_without_its_end_is_refused(copy: Path) -> None:
    data = (copy / "model.onnx").read_bytes()
    (copy / "model.onnx").write_bytes(data[: len(data) // 2])
    accept_model(copy)
    with pytest.raises(evla.ArtifactError, match=r"is no ONNX file \(a field of \d+ bytes where \d+ are left"):
        evla.verify(copy, threads=1)
