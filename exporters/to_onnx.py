"""Write a finished graph as an ONNX file with static shapes."""

import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import onnx_ir as ir
import torch
from onnx import checker
from onnx_ir.passes import common
from onnxscript import opset18, optimizer
from onnxscript.rewriter import onnx_fusions
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from torch import fx

from evla_compile.errors import ExportError
from evla_compile.exporters.lift import to_exported_program
from evla_compile.exporters.onnx_weights import (
    empty_initializers,
    leave_out_weights,
    put_weights_back,
    save,
    weight_bytes,
)
from evla_compile.graph.contract import WRITTEN_BY
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.settings.config import OPSET
from evla_compile.terminal import new_console

IR_VERSIONS: Mapping[int, int] = MappingProxyType({18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 10})
"""Version of ONNX's file format that is written, by opset: the oldest runtimes of an opset read no newer one."""

OPSETS = range(min(IR_VERSIONS), max(IR_VERSIONS) + 1)
"""ONNX opsets that can be written; 23 has attention and RMS normalisation as single operators, 24 loses the latter."""

EXTERNAL_DATA_BYTES = 1_900_000_000
"""Weights of more bytes are written to a separate file: a protobuf message ends at 2 GiB."""

_MODULE, _PASS = "module", "pass"
_TALKATIVE = ("torch.onnx._internal.exporter._registration", "onnx_ir.passes.common.initializer_deduplication")


@own_torch_state()
def to_onnx(
    gm: fx.GraphModule,
    path: Path,
    *,
    outputs: Sequence[str],
    inputs: Sequence[str] | None = None,
    inner: Sequence[str] = (),
    opset: int = OPSET,
    external_data_bytes: int = EXTERNAL_DATA_BYTES,
    progress: bool = False,
) -> None:
    """Write `gm`, whose shapes are static, to an ONNX file that `onnx.checker` accepts.

    The metadata of every node has the module of the policy that it came from, as "module", and the pass that wrote it,
    as "pass"; its name has both too. Weights are read one at a time, when they are written.

    Args:
        gm: the graph.
        path: the file; its external data, if it needs any, is `path` with ".data" appended.
        outputs: names of all outputs of `gm`, in order.
        inputs: names of the inputs, in order; None for those that `gm` gives them.
        inner: those of `outputs` that are none of the file's, but values inside it of that name.
        opset: ONNX opset, one of `OPSETS`.
        external_data_bytes: size of all weights above which they are written to a separate file.
        progress: whether to draw a progress bar on standard error while a file of weights is written.

    Raises:
        ExportError: an operator cannot be lowered, or the exporter or the checker refused the graph.
        ValueError: the opset is not one of `OPSETS`.
    """
    model = to_model(gm, outputs=outputs, inputs=inputs, inner=inner, opset=opset)
    size = weight_bytes(model)
    external = size > external_data_bytes
    with _bar(f"Writing {path.name}", size, shown=progress and external) as wrote:
        save(model, path, external=external, wrote=wrote)
    try:
        checker.check_model(str(path), full_check=False)
    except checker.ValidationError as error:
        raise ExportError(f"{path}: onnx.checker refuses the exported model: {error}") from error


@own_torch_state()
def to_model(
    gm: fx.GraphModule,
    *,
    outputs: Sequence[str],
    inputs: Sequence[str] | None = None,
    inner: Sequence[str] = (),
    opset: int = OPSET,
) -> ir.Model:
    """Return `gm` as an ONNX model in memory, whose weights are not read until the model is written.

    Args:
        gm: the graph.
        outputs: names of all outputs of `gm`, in order.
        inputs: names of the inputs, in order; None for those that `gm` gives them.
        inner: those of `outputs` that are none of the model's, but values inside it of that name.
        opset: ONNX opset, one of `OPSETS`.

    Raises:
        ExportError: an operator cannot be lowered, or the exporter refused the graph.
        ValueError: the opset is not one of `OPSETS`.
    """
    if opset not in OPSETS:
        raise ValueError(f"opset={opset!r}: expected one from {OPSETS.start} to {OPSETS.stop - 1}")
    program = to_exported_program(gm)
    weights = leave_out_weights(program)
    try:
        with _quiet_exporter():
            exported = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=opset,
                input_names=list(inputs or (str(node.target) for node in gm.graph.find_nodes(op="placeholder"))),
                output_names=list(outputs),
                custom_translation_table={torch.ops.aten.sort.stable: _stable_sort},
                optimize=False,
                verbose=False,
            )
    except (torch.onnx.OnnxExporterError, RuntimeError) as error:
        raise ExportError(f"torch's ONNX exporter failed at opset {opset}: {_first_cause(error)}") from error
    if exported is None:
        raise ExportError("torch's ONNX exporter returned no model")
    empty_initializers(exported.model, weights)
    with _quiet_exporter():
        _simplify(exported.model)
    put_weights_back(exported.model, weights)
    graph = exported.model.graph
    graph.outputs[:] = [value for value in graph.outputs if value.name not in inner]
    _keep_module_paths(exported.model)
    exported.model.ir_version = IR_VERSIONS[opset]
    return exported.model


@contextmanager
def _bar(what: str, size: int, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Draw a progress bar of bytes written; yield the function that advances it."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=new_console(stderr=True), transient=True, disable=not shown) as bar:
        task = bar.add_task(what, total=size)
        yield lambda count: bar.advance(task, count)


def _simplify(model: ir.Model) -> None:
    """Fold shapes and constants, share equal nodes, and fuse norms where the opset has an operator for them.

    The exporter's own optimisation takes ten times as long, for pattern rules that never match in these graphs.
    """
    optimizer.fold_constants(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.CommonSubexpressionEliminationPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.DeduplicateInitializersPass(),
    )(model)
    onnx_fusions.fuse(model)
    ir.passes.Sequential(
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _stable_sort(x: Any, *, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """Sort as ONNX's TopK over the whole axis, which gives the lower index first among equals.

    `x` and the result are symbolic tensors of onnxscript, whose type is not public.
    """
    count: Any = opset18.Constant(value_ints=[int(x.shape[dim])])
    return opset18.TopK(x, count, axis=dim, largest=int(descending), sorted=1)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Silence messages of the libraries that users cannot act on: no torchvision, no weights, deprecations in torch."""
    loggers = [logging.getLogger(name) for name in _TALKATIVE]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            warnings.simplefilter("ignore", DeprecationWarning)
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _keep_module_paths(model: ir.Model) -> None:
    """Reduce the exporter's metadata, stack traces with local paths among it, to each node's module path and pass.

    Both are part of the node's name too, since tools such as TensorRT report a node by its name alone.
    """
    for number, node in enumerate(model.graph.all_nodes()):
        modules = _listed(node, "pkg.torch.onnx.name_scopes")
        kinds = _listed(node, "pkg.torch.onnx.class_hierarchy")
        node.metadata_props.clear()
        path = modules[-1] if modules else ""
        if path:
            node.metadata_props[_MODULE] = path
        name = f"{node.op_type}_{number}"
        if kinds and kinds[-1].startswith(WRITTEN_BY):
            node.metadata_props[_PASS] = kinds[-1].removeprefix(WRITTEN_BY)
            name = f"{node.metadata_props[_PASS]}.{name}"
        node.name = f"{path}/{name}"
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _listed(node: ir.Node, key: str) -> list[str]:
    """Return the exporter's list of the modules around a node, without its last entry, which is the node itself."""
    entries = node.metadata_props.get(key, "[]").strip("[]").split(",")
    return [entry.strip(" '\"") for entry in entries][:-1]


def _first_cause(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
