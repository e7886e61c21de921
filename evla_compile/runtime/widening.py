"""Rewrite bfloat16 graphs to float32 for CPUs, where ONNX Runtime has no bfloat16; needs onnx when called."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.runtime.linked_weights import follow_links

if TYPE_CHECKING:
    import onnx

FACTOR = 2
"""Memory of bfloat16 weights in float32, as a multiple of their bytes in the file."""

REMEDY = "pip install onnx"
"""Command that installs the package onnx, which the runtime needs for nothing else."""


def read_widened(model: Path) -> tuple[bytes, Path]:
    """Return an ONNX file's graph, widened, in ONNX's own encoding, and the folder of its external data.

    Raises:
        EvlaError: onnx is not installed.
        ArtifactError: the file is no ONNX graph, or its external data is in several folders.
    """
    onnx = _import_onnx(model)
    try:
        graph = onnx.load(str(model), load_external_data=False)
    except import_module("google.protobuf.message").DecodeError as error:
        raise ArtifactError(f"{model} cannot be read: {error}; compile the policy again") from error
    folder = follow_links(graph, model.parent)
    widen(graph)
    return graph.SerializeToString(), folder


def widen(model: "onnx.ModelProto") -> None:
    """Change every bfloat16 value of `model` to float32; weights stay stored in bfloat16, and are cast when read.

    The casts are exact, so results differ only in that activations are not rounded to bfloat16.
    """
    onnx = import_module("onnx")
    narrow, wide = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    graph = model.graph
    del graph.value_info[:]
    stored = [tensor for tensor in graph.initializer if tensor.data_type == narrow]
    casts = []
    for tensor in stored:
        name, tensor.name = tensor.name, f"{tensor.name}/bfloat16"
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=wide))
    for node in graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to" and attribute.i == narrow:
                attribute.i = wide
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


def _import_onnx(model: Path) -> Any:
    try:
        return import_module("onnx")
    except ImportError as error:
        raise EvlaError(
            f"{model} is a bfloat16 graph, which ONNX Runtime runs on a CPU in float32 alone, and the package that"
            f" rewrites it cannot be imported ({error}): {REMEDY}, or export it with precision='float32'"
        ) from error
