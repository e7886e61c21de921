"""Write a compiled policy as an artifact: graphs, tokenizer, report, recorded cases, and a manifest of them all."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from evla_compile import __version__
from evla_compile.arguments import whole_number
from evla_compile.artifact.cases import RecordedCase, check_finite, probe, write_cases
from evla_compile.artifact.files import ROOM_BYTES, ArtifactFiles, check_space, check_target, part_name, writing
from evla_compile.artifact.manifest import Manifest, write_manifest
from evla_compile.artifact.records import FileRecord, Part, TensorSpec
from evla_compile.compiler.result import CompiledGraph
from evla_compile.errors import ExportError
from evla_compile.exporters.build import build_engine, check_engine
from evla_compile.exporters.precision import compare, lower
from evla_compile.exporters.split import Piece, split
from evla_compile.exporters.stage_run import replay_graphs
from evla_compile.exporters.to_onnx import to_onnx
from evla_compile.graph.contract import weights
from evla_compile.graph.sites import verified_stages
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import GraphInputs, observations
from evla_compile.json_text import to_json_text
from evla_compile.settings.anatomy import SAMPLES
from evla_compile.settings.config import OPSET
from evla_compile.settings.engine_settings import EngineSettings
from evla_compile.settings.plan_tensors import write_tensors
from evla_compile.settings.precision import PRECISIONS, Precision

_log = logging.getLogger(__name__)

_LIBRARIES = ("torch", "transformers", "onnx", "onnxscript", "numpy")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExportSettings:
    """What to write; see `CompiledPolicy.export`.

    Raises:
        ValueError: the precision is not in `PRECISIONS`, or opset or parts are not whole numbers from 1 up.
    """

    opset: int = OPSET
    """ONNX opset."""
    stages: tuple[str, ...] = ()
    """Further outputs, after `samples`; see `ExposeStages`."""
    precision: Precision = "float32"
    """Dtype of matrix products outside the action head."""
    parts: int = 1
    """Graphs to split the policy into."""
    engine: EngineSettings | None = None
    """How to build engines, where the target is an `X.engine`."""
    progress: bool = True
    """Whether to draw progress bars on standard error."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        for name in ("opset", "parts"):
            object.__setattr__(self, name, whole_number(name, getattr(self, name), low=1))


@own_torch_state()
def export_artifact(compiled: CompiledGraph, target: str | os.PathLike[str], settings: ExportSettings) -> None:
    """Write `compiled` to `target`, an `X.onnx`, an `X.engine` or a folder; see `CompiledPolicy.export`."""
    check_target(target)
    wanted = settings.engine
    if Path(target).suffix == ".engine":
        wanted = wanted or EngineSettings()
        check_engine(wanted)
    elif wanted is not None:
        raise ValueError(
            f"engine= for {target}: expected a target that ends in .engine; or build one afterwards, evla build"
        )
    outputs = (SAMPLES, *settings.stages)
    inner = tuple(name for name in verified_stages(compiled.graph.graph) if name not in outputs)
    graph = compiled.exposing((*outputs, *inner))
    pieces = lower(split(graph, (*outputs, *inner), settings.parts), settings.precision, compiled.plan.ranges)
    size = sum(tensor.numel() * tensor.element_size() for piece in pieces for _, tensor in weights(piece.graph))
    refit = 0 if compiled.plan.tensor_file is None else compiled.plan.tensor_file.size
    check_space(target, (2 if wanted else 1) * size + refit + ROOM_BYTES)
    files = ArtifactFiles.of(target)
    cases = record_cases(compiled, outputs, inner)
    report = compiled.report.to_json()
    if settings.precision != "float32":
        report["precision"] = compare(pieces, cases, settings.precision, compiled.config.text_tokens)
    with writing(target) as folder:
        parts = tuple(_write_part(piece, files, folder, inner, len(pieces), settings) for piece in pieces)
        (folder / files.tokenizer).write_text(compiled.processor.tokenizer_json, encoding="utf-8")
        (folder / files.report).write_text(to_json_text(report, indent=1) + "\n", encoding="utf-8")
        if compiled.plan.tensors:
            write_tensors(folder / files.tensors, compiled.plan.tensors)
        write_cases(cases, folder / files.cases)
        manifest = _describe(compiled, files, folder, parts, cases[0], settings)
        write_manifest(manifest, folder / files.manifest)
        if settings.precision != "float32":
            _compare_on_onnx_runtime(manifest, folder, cases)
        if wanted is not None:
            build_engine(folder / files.manifest, wanted, progress=settings.progress)


def _compare_on_onnx_runtime(manifest: Manifest, folder: Path, cases: Sequence[RecordedCase]) -> None:
    """Check written graphs as `verify` will: ONNX Runtime rounds differently from torch.

    Raises:
        VerificationError: a stage leaves the tolerance of the precision; the message names the first.
    """
    if find_spec("onnxruntime") is None:
        _log.warning(
            "ONNX Runtime is not installed: this policy in %s was compared in torch alone, run evla verify where it is",
            manifest.precision,
        )
        return
    replay_graphs(f"this policy in {manifest.precision}", manifest, folder, cases)


def _write_part(
    piece: Piece, files: ArtifactFiles, folder: Path, inner: Sequence[str], parts: int, settings: ExportSettings
) -> Part:
    model = folder / part_name(files.model, piece.name, parts)
    hidden = [name for name in piece.outputs if name in inner and name not in piece.handed_on]
    to_onnx(
        piece.graph,
        model,
        inputs=piece.inputs,
        outputs=piece.outputs,
        inner=hidden,
        opset=settings.opset,
        progress=settings.progress,
    )
    data = model.with_name(f"{model.name}.data")
    graph = piece.graph.graph
    results = zip(piece.outputs, graph.output_node().all_input_nodes, strict=True)
    return Part(
        name=piece.name,
        model=FileRecord.measure(model),
        data=(FileRecord.measure(data),) if data.exists() else (),
        inputs=tuple(map(_spec, piece.inputs, graph.find_nodes(op="placeholder"))),
        outputs=tuple(_spec(name, node) for name, node in results if name not in hidden),
    )


def _describe(
    compiled: CompiledGraph,
    files: ArtifactFiles,
    folder: Path,
    parts: tuple[Part, ...],
    case: RecordedCase,
    settings: ExportSettings,
) -> Manifest:
    inputs = [(str(node.target), node) for node in compiled.graph.graph.find_nodes(op="placeholder")]
    return Manifest(
        created_by=__version__,
        parts=parts,
        engine=None,
        precision=settings.precision,
        tokenizer=FileRecord.measure(folder / files.tokenizer),
        report=FileRecord.measure(folder / files.report),
        tensors=FileRecord.measure(folder / files.tensors) if compiled.plan.tensors else None,
        cases=FileRecord.measure(folder / files.cases),
        inputs=tuple(_spec(*entry) for entry in inputs),
        outputs=tuple(
            TensorSpec(name=name, dtype=str(value.dtype), shape=value.shape) for name, value in case.outputs.items()
        ),
        config=compiled.config,
        plan=compiled.plan,
        statistics=compiled.processor.statistics,
        vocabulary=compiled.sizes.language.vocabulary,
        pad_id=compiled.processor.pad_id,
        opset=settings.opset,
        versions={library: version(library) for library in _LIBRARIES},
    )


def _spec(name: str, node: torch.fx.Node) -> TensorSpec:
    value = node.meta["val"]
    return TensorSpec(name=name, dtype=str(value.dtype).removeprefix("torch."), shape=tuple(value.shape))


@own_torch_state()
def record_cases(compiled: CompiledGraph, outputs: tuple[str, ...], inner: tuple[str, ...] = ()) -> list[RecordedCase]:
    """Run the torch graph on the policy's recorded frames, so that any runtime can be compared with it later.

    Of the stages `inner`, samples of the values are kept; see `evla_compile.artifact.cases.probe`.

    A policy compiled without calibration frames has no recorded frames. Then two images of seeded noise are used: they
    serve to compare two lowerings of the same graph, and say nothing about its quality.

    Raises:
        ExportError: a value that the policy computes is not finite.
    """
    frames, cases = compiled.frames or _noise_frames(compiled.sizes.image_side), []
    for number, batch in enumerate(observations(frames, compiled.config.batch_size)):
        images, instructions = zip(*batch, strict=True)
        inputs = GraphInputs.prepare(compiled.processor, images, instructions, compiled.signature, seed=number)
        found = compiled.outputs(*inputs.arrays, stages=(*outputs, *inner))
        cases.append(
            RecordedCase(
                inputs=inputs,
                outputs={name: found[name] for name in outputs},
                stages={name: probe(name, found[name], compiled.config.text_tokens) for name in inner},
            )
        )
    for number, case in enumerate(cases):
        try:
            check_finite(case, f"recorded frame {number}")
        except ValueError as error:
            raise ExportError(f"{error}, so nothing could be verified: check the weights and their dtype") from error
    return cases


def _noise_frames(side: int) -> tuple[Frame, ...]:
    draw = np.random.Generator(np.random.PCG64(0))
    instructions = ("pick up the object", "open it")
    return tuple(Frame(draw.integers(0, 256, (side, side, 3), dtype=np.uint8), text) for text in instructions)
