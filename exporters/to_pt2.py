"""Write a compiled policy as a `.pt2` file, for programs that run torch: ExportedProgram or AOTInductor package."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal, TypeAlias
from zipfile import BadZipFile, ZipFile

import torch
from torch import fx
from torch.export import ExportedProgram

from evla_compile import __version__
from evla_compile.artifact.files import check_space
from evla_compile.compiler.result import CompiledGraph
from evla_compile.errors import ArtifactError, ExportError
from evla_compile.exporters.artifact import record_cases
from evla_compile.exporters.lift import to_exported_program
from evla_compile.exporters.precision import compare, lower
from evla_compile.exporters.split import split
from evla_compile.graph.contract import copy_graph, materialize, weights
from evla_compile.graph.sites import verified_stages
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.json_text import to_json_text
from evla_compile.passes.expose_stages import ExposeStages
from evla_compile.scratch import replacing
from evla_compile.settings.anatomy import COGACT, SAMPLES
from evla_compile.settings.precision import Precision

Packaging: TypeAlias = Literal["exported", "aoti"]
"""An ExportedProgram, which torch runs or compiles, or an AOTInductor package: machine code for such a machine."""

DESCRIPTION = "evla_compile.json"
"""Name of the extra file that describes an ExportedProgram, and of the same entry in a package's metadata."""


@own_torch_state()
def to_pt2(
    compiled: CompiledGraph, path: Path, *, packaging: Packaging, stages: tuple[str, ...], precision: Precision
) -> None:
    """Write a policy's finished graph, which takes `GraphInputs.arrays` and returns a tuple, `samples` first.

    An earlier file that this function wrote is replaced, others never. All weights are in memory while the file is
    written. An ExportedProgram is read by `torch.export.load`; an AOTInductor package by
    `torch._inductor.aoti_load_package`, on a machine of the kind that wrote it, with `DESCRIPTION` in `get_metadata()`.

    Args:
        compiled: the policy.
        path: the file.
        packaging: what to write.
        stages: further outputs, after `samples`.
        precision: dtype of matrix products outside the action head.

    Raises:
        ArtifactError: the file cannot be written, the disk is full, or something else is in its place.
        ExportError: the graph cannot be lowered, or no C++ compiler is there.
        ValueError: `packaging` is unknown.
        VerificationError: a stage leaves the tolerance of `precision`.
    """
    if packaging not in ("exported", "aoti"):
        raise ValueError(f"packaging={packaging!r}: expected 'exported' or 'aoti'")
    if packaging == "aoti" and not any(map(shutil.which, ("g++", "clang++"))):
        raise ExportError("AOTInductor needs a C++ compiler and found none: apt install g++")
    _refuse_foreign(path)
    outputs = (SAMPLES, *stages)
    if precision != "float32":
        _check_precision(compiled, precision)
    exposed, _ = ExposeStages(stages=outputs)(compiled.graph)
    (piece,) = lower(split(exposed, outputs, 1), precision, compiled.plan.ranges)
    graph = copy_graph(piece.graph)
    check_space(path, sum(tensor.numel() * tensor.element_size() for _, tensor in weights(graph)))
    materialize(graph)
    about = {
        "created_by": __version__,
        "config": compiled.config.to_json(),
        "plan": compiled.plan.to_json(),
        "inputs": list(COGACT.input_names),
        "outputs": list(outputs),
        "precision": precision,
    }
    text = to_json_text(about)
    try:
        with replacing(path) as new:
            if packaging == "exported":
                torch.export.save(to_exported_program(graph), new, extra_files={DESCRIPTION: text})
            else:
                torch._inductor.aoti_compile_and_package(
                    _traced(graph),
                    package_path=os.fspath(new),
                    inductor_configs={"aot_inductor.metadata": {DESCRIPTION: text}},
                )
            _refuse_foreign(path)
    except OSError as error:
        raise ArtifactError(f"{path} cannot be written: {error}") from error


def _refuse_foreign(path: Path) -> None:
    """Refuse to replace a file without the description that `to_pt2` writes."""
    if os.path.lexists(path) and not (path.is_file() and _is_described(path)):
        raise ArtifactError(f"{path} exists and is not ours: choose another name or remove it")


def _is_described(path: Path) -> bool:
    try:
        with ZipFile(path) as archive:
            for name in archive.namelist():
                if name.endswith(f"/extra/{DESCRIPTION}"):
                    return True
                if name.endswith("_metadata.json"):
                    metadata: Any = json.loads(archive.read(name))
                    return isinstance(metadata, dict) and DESCRIPTION in metadata
    except (BadZipFile, ValueError, NotImplementedError):  # no zip, no JSON, an unknown compression
        return False
    return False


def _check_precision(compiled: CompiledGraph, precision: Precision) -> None:
    """Compare the graph in lower precision with the float32 one, stage by stage, on the recorded frames."""
    names = (SAMPLES, *verified_stages(compiled.graph.graph))
    pieces = lower(split(compiled.exposing(names), names, 1), precision, compiled.plan.ranges)
    cases = record_cases(compiled, (SAMPLES,), names[1:])
    compare(pieces, cases, precision, compiled.config.text_tokens)


def _traced(gm: fx.GraphModule) -> ExportedProgram:
    """Export a graph by torch.export with example inputs: AOTInductor takes nothing else."""
    values = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    inputs = tuple(torch.zeros(value.shape, dtype=value.dtype, device=value.device) for value in values)
    with torch.no_grad():
        return torch.export.export(gm, inputs, strict=False)
