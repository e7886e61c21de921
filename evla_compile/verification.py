"""Proofs about an exported policy: intact files, static shapes, and the outputs of the graph that it was made from."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import checker, shape_inference

from evla_compile.artifact import check_files, find_manifest
from evla_compile.errors import ArtifactError, VerificationError
from evla_compile.manifest import TensorSpec, read_manifest
from evla_compile.recorded import read_cases
from evla_compile.runtime import load
from evla_compile.tolerances import TOLERANCES, relative_error

_DATA_DEPENDENT = ("Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` found; it raises when something does not hold."""

    nodes: int
    """Operators of the ONNX graph, all outputs of which have static integer shapes."""
    cases: int
    """Recorded cases replayed."""
    errors: tuple[tuple[str, float], ...]
    """Per output, its largest error relative to the largest value recorded; the worst case."""
    tolerance: float
    """What every error must stay within."""


def verify(path: str | os.PathLike[str], *, threads: int | None = None) -> Verification:
    """Verify an artifact on ONNX Runtime, CPU.

    Its files match their hashes, `onnx.checker` accepts the graph, every value in it has a static integer shape, and on
    the recorded cases ONNX Runtime returns what the torch graph returned.

    Args:
        path: an artifact's folder, or an `.onnx` file with its manifest beside it.
        threads: threads of ONNX Runtime; None leaves the number to it.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        VerificationError: a shape is not static, or an output differs; the message names it.
    """
    place = find_manifest(path)
    manifest = read_manifest(place)
    check_files(manifest, place.parent)
    model = place.with_name(manifest.model.name)
    try:
        checker.check_model(str(model))
    except checker.ValidationError as error:
        raise VerificationError(f"{model}: onnx.checker refuses it: {error}") from error
    nodes = prove_static_shapes(model)
    _check_external_data(model, {record.name for record in manifest.data})
    policy = load(place, threads=threads, check_hashes=False, mapped=True)  # a few calls, of any size of policy
    worst: dict[str, float] = {}
    cases = read_cases(place.with_name(manifest.cases.name))
    for case in cases:
        _check_names("inputs", case.inputs, manifest.inputs)
        _check_names("outputs", case.outputs, manifest.outputs)
        found = policy.outputs(*(case.inputs[spec.name] for spec in manifest.inputs))
        for name, expected in case.outputs.items():
            worst[name] = max(worst.get(name, 0.0), relative_error(found[name], expected))
    for name, largest in worst.items():
        if largest > TOLERANCES.lowered:
            raise VerificationError(
                f"{model}: output {name} on ONNX Runtime is {largest:.2e} (relative to its largest value) from the"
                f" torch graph that it was made from, tolerance {TOLERANCES.lowered:.0e}; do not deploy it"
            )
    return Verification(nodes=nodes, cases=len(cases), errors=tuple(worst.items()), tolerance=TOLERANCES.lowered)


def prove_static_shapes(path: Path) -> int:
    """Prove that every value of an ONNX graph has a shape of literal integers; return the number of its operators.

    The shapes that the file itself declares for inner values are set aside and inferred anew by onnx.

    Raises:
        VerificationError: a value has no such shape, or an operator's output shape depends on data.
    """
    return prove_static_shapes_of(onnx.load(str(path), load_external_data=False), str(path))


def prove_static_shapes_of(model: onnx.ModelProto, path: str) -> int:
    """Prove the same of a model in memory, which errors call `path`; its weights may be absent.

    Raises:
        VerificationError: as for `prove_static_shapes`.
    """
    del model.graph.value_info[:]
    try:
        inferred = shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except shape_inference.InferenceError as error:
        raise VerificationError(f"{path}: its shapes cannot be inferred: {error}") from error
    graph = inferred.graph
    static = {value.name for value in (*graph.input, *graph.value_info, *graph.output) if _is_static(value)}
    for value in (*graph.input, *graph.output):
        if value.name not in static:
            raise VerificationError(f"{path}: {value.name} has a dynamic shape; export with static shapes")
    for node in graph.node:
        dynamic = [name for name in node.output if name and name not in static]
        if node.op_type in _DATA_DEPENDENT or dynamic:
            raise VerificationError(
                f"{path}: {node.op_type} node {node.name!r} has a dynamic shape in {dynamic or list(node.output)}"
            )
    return len(graph.node)


def _check_names(kind: str, arrays: Mapping[str, object], specs: Sequence[TensorSpec]) -> None:
    if set(arrays) != {spec.name for spec in specs}:
        raise ArtifactError(f"a recorded case has the {kind} {sorted(arrays)}: expected {', '.join(map(str, specs))}")


def _check_external_data(path: Path, listed: set[str]) -> None:
    """Refuse weights that lie in files which the manifest does not list, and so nobody hashes."""
    model = onnx.load(str(path), load_external_data=False)
    entries = [entry for tensor in model.graph.initializer for entry in tensor.external_data]
    used = {entry.value for entry in entries if entry.key == "location"}
    if used != listed:
        raise VerificationError(f"{path} keeps weights in {sorted(used)}, its manifest lists {sorted(listed)}")


def _is_static(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(
        size.HasField("dim_value") and size.dim_value > 0 for size in tensor.shape.dim
    )
