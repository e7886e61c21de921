"""Verify an exported policy: intact files, static shapes, and the outputs of the graph that it was exported from."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, checker, shape_inference

from evla_compile.arguments import whole_number
from evla_compile.artifact.cases import read_cases
from evla_compile.artifact.external_data import check_external_data
from evla_compile.artifact.files import check_files, find_manifest
from evla_compile.artifact.hub import local_artifact
from evla_compile.artifact.manifest import read_manifest
from evla_compile.artifact.records import Part
from evla_compile.artifact.replay import replay
from evla_compile.errors import VerificationError
from evla_compile.exporters.stage_run import replay_graphs
from evla_compile.fidelity.measure import Fidelity
from evla_compile.runtime import Provider, load
from evla_compile.runtime.linked_weights import read_checked
from evla_compile.settings.anatomy import INPUT_IDS, SAMPLES
from evla_compile.settings.tolerances import lowered_tolerance
from evla_compile.verification.compile_report import read_report

_FLOATS = {"float": "float32", "double": "float64"}
"""Dtypes whose names in ONNX differ from numpy's: ONNX name -> numpy name."""
_DATA_DEPENDENT = ("Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` measured; it raises where a check fails."""

    nodes: int
    """Operators of the ONNX graphs, all outputs of which have static integer shapes."""
    cases: int
    """Recorded cases replayed."""
    stages: tuple[tuple[str, float], ...]
    """Per stage and output, in data-flow order, the error of the ONNX graphs against the recorded values, relative to
    the largest of these; the worst case."""
    errors: tuple[tuple[str, float], ...]
    """The same for the outputs alone, as the runtime returns them."""
    tolerance: float
    """Largest error that the samples may have."""
    fidelity: Fidelity | None
    """How far its actions were from the dense policy's when it was compiled, as its report says, which is not measured
    again; None where no frames were given."""


def verify(
    path: str | os.PathLike[str], *, threads: int | None = None, provider: Provider | None = None
) -> Verification:
    """Verify an artifact against what the float32 torch graph returned for its recorded cases.

    It proves, in this order:

    1. the files match their hashes, and the graphs read no file that the manifest does not list;
    2. `onnx.checker` accepts the graphs, and every value in them has a static integer shape;
    3. on the recorded cases, every stage of the ONNX graphs, run on a CPU, stays within the tolerance of the artifact's
       precision (vision, projector, each decoder layer, cognition, each denoising step);
    4. and so does every output as the runtime returns it.

    Args:
        path: an artifact's folder, an `.onnx` or `.engine` file with its manifest beside it, or the id of a Hugging
            Face repository with an artifact's folder.
        threads: threads of ONNX Runtime; None leaves the number to it.
        provider: where the runtime computes; see `evla_compile.runtime.load`.

    Raises:
        ArtifactError: the artifact is missing or damaged, its graphs read files that its manifest does not list, or its
            recorded cases are not those of such a policy.
        EvlaError: the runtime cannot compute where it was asked to.
        ValueError: `threads` is no whole number from 1 up.
        VerificationError: a shape is not static, inputs or outputs are not those of the manifest, or a stage or output
            differs; the message names the first.
    """
    if threads is not None:
        threads = whole_number("threads", threads, low=1, otherwise="None")
    path = local_artifact(path, lambda manifest: manifest.files)
    place = find_manifest(path)
    manifest = read_manifest(place)
    check_files(manifest.files, place.parent)
    nodes = sum(_prove(place.parent, part, manifest.vocabulary) for part in manifest.parts)
    cases = read_cases(place.with_name(manifest.cases.name), manifest)
    stages = replay_graphs(str(place.parent), manifest, place.parent, cases, threads=threads)
    on_cpu = provider == "cpu" or (provider is None and path.suffix != ".engine")
    policy = load(path, provider, threads, check_hashes=False, mapped=on_cpu)
    errors = replay(
        f"{place.parent} in the runtime",
        lambda inputs: policy.outputs(*inputs.arrays),
        [replace(case, stages={}) for case in cases],
        precision=manifest.precision,
        text_tokens=manifest.config.text_tokens,
    )
    return Verification(
        nodes=nodes,
        cases=len(cases),
        stages=tuple(stages.items()),
        errors=tuple(errors.items()),
        tolerance=lowered_tolerance(manifest.precision, SAMPLES),
        fidelity=read_report(place.with_name(manifest.report.name)),
    )


def _prove(folder: Path, part: Part, vocabulary: int) -> int:
    """Check one graph without running it; return the number of its operators."""
    path = folder / part.model.name
    check_external_data(part, folder)
    try:
        model = read_checked(path)
    except (checker.ValidationError, DecodeError, UnicodeDecodeError) as error:
        raise VerificationError(f"{path}: onnx.checker refuses it: {error}") from error
    nodes = prove_static_shapes_of(model, str(path))
    for kind, values, specs in (
        ("inputs", model.graph.input, part.inputs),
        ("outputs", model.graph.output, part.outputs),
    ):
        found, expected = sorted(map(_describe, values)), sorted(map(str, specs))
        if found != expected:
            raise VerificationError(
                f"{path}: its {kind} are {', '.join(found)}: expected {', '.join(expected)} by the manifest"
            )
    rows = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if tensor.dims}
    for node in model.graph.node:
        if node.op_type == "Gather" and INPUT_IDS in node.input and rows.get(node.input[0], vocabulary) != vocabulary:
            raise VerificationError(
                f"{path}: the token embedding has {rows[node.input[0]]} rows, {vocabulary} by the manifest"
            )
    return nodes


def _describe(value: onnx.ValueInfoProto) -> str:
    """Return a value of static shape as `TensorSpec` prints it."""
    tensor = value.type.tensor_type
    kind = TensorProto.DataType.Name(tensor.elem_type).lower()
    return f"{value.name} {_FLOATS.get(kind, kind)}{[size.dim_value for size in tensor.shape.dim]}"


def prove_static_shapes(path: Path) -> int:
    """Prove that every value of an ONNX graph has a shape of literal integers; return the number of its operators.

    The shapes that the file itself declares for inner values are ignored; onnx infers them.

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
    except (shape_inference.InferenceError, ValueError) as error:  # ValueError: a dtype that ONNX does not have
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


def _is_static(value: onnx.ValueInfoProto) -> bool:
    tensor = value.type.tensor_type
    return tensor.HasField("shape") and all(
        size.HasField("dim_value") and size.dim_value > 0 for size in tensor.shape.dim
    )
