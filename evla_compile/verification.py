"""Proofs about an exported policy: intact files, static shapes, and the outputs of the graph that it was made from."""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from onnx import checker, shape_inference

from evla_compile.arguments import whole_number
from evla_compile.artifact import check_files, find_manifest
from evla_compile.errors import ArtifactError, VerificationError
from evla_compile.manifest import Manifest, Part, TensorSpec, read_manifest
from evla_compile.recorded import RecordedCase, read_cases, stage_errors
from evla_compile.runtime import Provider, RuntimePolicy, load
from evla_compile.stage_run import StageRun
from evla_compile.tolerances import check_stages, lowered_tolerance

_DATA_DEPENDENT = ("Compress", "If", "Loop", "NonMaxSuppression", "NonZero", "Scan", "Unique")


@dataclass(frozen=True, kw_only=True, slots=True)
class Verification:
    """What `verify` found; it raises when something does not hold."""

    nodes: int
    """Operators of the ONNX graphs, all outputs of which have static integer shapes."""
    cases: int
    """Recorded cases replayed."""
    stages: tuple[tuple[str, float], ...]
    """Per stage and output, in data-flow order, how far the ONNX graphs are from what was recorded, relative to the
    largest value recorded; the worst case."""
    errors: tuple[tuple[str, float], ...]
    """The same of the outputs alone, as the runtime returns them, or would: bfloat16, which ONNX Runtime lacks on CPUs,
    is run in float32 arithmetic."""
    tolerance: float
    """What the error of the samples must stay within."""


def verify(
    path: str | os.PathLike[str], *, threads: int | None = None, provider: Provider | None = None
) -> Verification:
    """Verify an artifact against what the float32 torch graph returned for its recorded cases.

    Its files match their hashes, `onnx.checker` accepts the graphs, every value in them has a static integer shape, and
    on the recorded cases every stage of the ONNX graphs, run on a CPU, stays within the tolerance of the artifact's
    precision (vision, projector, each decoder layer, cognition, each denoising step), and so does every output as the
    runtime returns it.

    Args:
        path: an artifact's folder, an `.onnx` or `.engine` file with its manifest beside it.
        threads: threads of ONNX Runtime; None leaves the number to it.
        provider: where the runtime computes; see `evla_compile.runtime.load`.

    Raises:
        ArtifactError: the artifact is missing or damaged.
        EvlaError: the runtime cannot compute where it was asked to.
        ValueError: `threads` is no whole number from 1 up.
        VerificationError: a shape is not static, or a stage or output differs; the message names the first.
    """
    if threads is not None:
        threads = whole_number("threads", threads, low=1, otherwise="None")
    place = find_manifest(path)
    manifest = read_manifest(place)
    check_files(manifest.files, place.parent)
    nodes = sum(_prove(place.with_name(part.model.name), part) for part in manifest.parts)
    cases = read_cases(place.with_name(manifest.cases.name))
    for case in cases:
        _check_names("inputs", case.inputs, manifest.inputs)
        _check_names("outputs", case.outputs, manifest.outputs)
    stages = _replay_stages(manifest, place, cases, threads)
    check_stages(f"{place.parent} on ONNX Runtime", stages, manifest.precision)
    errors = {name: error for name, error in stages.items() if name not in cases[0].stages}
    on_cpu = provider == "cpu" or (provider is None and Path(path).suffix != ".engine")
    if not on_cpu or manifest.precision != "bfloat16":
        errors = _replay_outputs(load(path, provider, threads, check_hashes=False, mapped=on_cpu), cases)
        check_stages(f"{place.parent} in the runtime", errors, manifest.precision)
    return Verification(
        nodes=nodes,
        cases=len(cases),
        stages=tuple(stages.items()),
        errors=tuple(errors.items()),
        tolerance=lowered_tolerance(manifest.precision, "samples"),
    )


def _replay_stages(
    manifest: Manifest, place: Path, cases: Sequence[RecordedCase], threads: int | None
) -> dict[str, float]:
    graphs = StageRun(manifest.parts, place.parent, tuple(cases[0].stages), threads=threads)
    text_tokens = manifest.config.text_tokens
    return _worst(stage_errors(case, graphs.run(case.inputs), text_tokens) for case in cases)


def _replay_outputs(policy: RuntimePolicy, cases: Sequence[RecordedCase]) -> dict[str, float]:
    inputs, text_tokens = policy.manifest.inputs, policy.config.text_tokens
    found = (policy.outputs(*(case.inputs[spec.name] for spec in inputs)) for case in cases)
    return _worst(stage_errors(case, outputs, text_tokens) for case, outputs in zip(cases, found, strict=True))


def _worst(errors: Iterable[Mapping[str, float]]) -> dict[str, float]:
    worst: dict[str, float] = {}
    for found in errors:
        worst |= {name: max(worst.get(name, 0.0), error) for name, error in found.items()}
    return worst


def _prove(model: Path, part: Part) -> int:
    """Prove what holds of one graph without running it; return the number of its operators."""
    try:
        checker.check_model(str(model))
    except checker.ValidationError as error:
        raise VerificationError(f"{model}: onnx.checker refuses it: {error}") from error
    _check_external_data(model, {record.name for record in part.data})
    return prove_static_shapes(model)


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
