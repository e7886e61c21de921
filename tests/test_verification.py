"""The static-shape proof and the verification of artifacts."""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import evla_compile as evla
from evla_compile.artifact import check_files
from evla_compile.compiled import CompiledPolicy
from evla_compile.config import CompileConfig
from evla_compile.manifest import FileRecord, read_manifest, write_manifest
from evla_compile.model.policy import CogACT
from evla_compile.recorded import RecordedCase, read_cases, write_cases
from evla_compile.verification import prove_static_shapes


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


def accept_model(folder: Path) -> None:
    """Make the manifest of `folder` agree with its changed graph."""
    manifest = read_manifest(folder / "manifest.json")
    (part,) = manifest.parts
    manifest = replace(manifest, parts=(replace(part, model=FileRecord.measure(folder / part.model.name)),))
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


def change_a_weight(model: onnx.ModelProto) -> None:
    weight = next(w for w in model.graph.initializer if w.name.endswith("final_layer.linear.bias"))
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) + np.float32(1.0), weight.name))


@pytest.mark.parametrize(("kind", "name"), [("inputs", "noise"), ("outputs", "samples")])
def test_a_case_that_lacks_an_array_proves_nothing(kind: str, name: str, copy: Path) -> None:
    (case, *_) = read_cases(copy / "cases.npz")
    arrays = {"inputs": dict(case.inputs), "outputs": dict(case.outputs)}
    del arrays[kind][name]
    write_cases([RecordedCase(inputs=arrays["inputs"], outputs=arrays["outputs"])], copy / "cases.npz")
    manifest = replace(read_manifest(copy / "manifest.json"), cases=FileRecord.measure(copy / "cases.npz"))
    write_manifest(manifest, copy / "manifest.json")
    with pytest.raises(evla.ArtifactError, match=f"a recorded case has the {kind}"):
        evla.verify(copy, threads=1)


def test_weights_in_a_file_that_the_manifest_does_not_list_are_refused(copy: Path) -> None:
    model = onnx.load(copy / "model.onnx")
    onnx.save(model, copy / "model.onnx", save_as_external_data=True, location="hidden.bin", size_threshold=1024)
    accept_model(copy)
    with pytest.raises(evla.VerificationError, match=r"keeps weights in \['hidden.bin'\]"):
        evla.verify(copy, threads=1)


def test_recorded_cases_round_trip(tmp_path: Path) -> None:
    case = RecordedCase(inputs={"x": np.arange(3)}, outputs={"y": np.ones((1, 2), dtype=np.float32)})
    write_cases([case, case], tmp_path / "cases.npz")
    found = read_cases(tmp_path / "cases.npz")
    assert len(found) == 2
    assert found[1].inputs["x"].tolist() == [0, 1, 2]
    assert found[1].outputs["y"].dtype == np.float32


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04"])
def test_damaged_cases_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cases.npz").write_bytes(content)
    with pytest.raises(evla.ArtifactError, match="recorded cases"):
        read_cases(tmp_path / "cases.npz")


def test_pickled_cases_are_never_loaded(tmp_path: Path) -> None:
    objects: dict[str, Any] = {"0/inputs/x": np.array([{}], dtype=object)}
    np.savez(tmp_path / "cases.npz", **objects)
    with pytest.raises(evla.ArtifactError, match="recorded cases"):
        read_cases(tmp_path / "cases.npz")
