"""The weights of an ONNX model: never touched while its graph is made, and streamed to the file one at a time."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir import tensor_adapters
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram

from evla_compile.graph.deferred import materialized

ALIGNMENT = 65536
"""Offset of large tensors in a data file, in bytes: what every system can map into memory."""


def leave_out_weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Replace the tensors of `program` by fake ones, which have a form but no data, and return them by name."""
    weights: dict[str, Tensor] = dict(program.state_dict)
    with FakeTensorMode():
        for name, tensor in weights.items():
            program.state_dict[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return weights


def empty_initializers(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Tell rewrites of `model` that the values of these initializers are not known."""
    for name in sorted(model.graph.initializers.keys() & weights.keys()):
        model.graph.initializers[name].const_value = None


def put_weights_back(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Give the initializers of `model` their tensors, each to be read when it is written.

    ONNX multiplies by a matrix where torch multiplies by its transpose: a weight that the graph only transposes is
    stored transposed.
    """
    graph = model.graph
    transposed: dict[tuple[str, tuple[int, ...]], ir.Value] = {}
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Transpose" else None
        if source is None or source.name is None or source.name not in weights:
            continue
        permutation = tuple(node.attributes["perm"].as_ints())
        key = (source.name, permutation)
        if key not in transposed:
            tensor = _stored(weights[source.name], f"{source.name}.T", permutation)
            transposed[key] = ir.Value(name=tensor.name, shape=tensor.shape, type=source.type, const_value=tensor)
            graph.register_initializer(transposed[key])
        node.outputs[0].replace_all_uses_with(transposed[key])
        graph.remove(node, safe=True)
    for name in sorted(graph.initializers.keys() & weights.keys()):
        if graph.initializers[name].uses():
            graph.initializers[name].const_value = _stored(weights[name], name, tuple(range(weights[name].ndim)))
        else:
            del graph.initializers[name]


def weight_bytes(model: ir.Model) -> int:
    """Return the bytes of all initializers."""
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def without_data(model: ir.Model) -> onnx.ModelProto:
    """Return `model` as a protobuf message whose weights are said to be in a file that is never written.

    For looking at a graph whose weights are not there. `model` loses its weights.
    """
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if isinstance(tensor, ir.LazyTensor):
            value.const_value = ir.ExternalTensor(
                "absent", 0, tensor.nbytes, tensor.dtype, shape=tensor.shape, name=str(tensor.name)
            )
    return ir.to_proto(model)


def save(model: ir.Model, path: Path, *, external: bool, wrote: Callable[[int], None]) -> None:
    """Write `model`, its weights one at a time.

    Args:
        model: the model.
        path: the ONNX file; its external data is `path` with ".data" appended.
        external: whether the weights go to a file of their own.
        wrote: called with the bytes of each tensor once it is about to be written to the data file.
    """
    ir.save(
        model,
        path,
        external_data=path.name + ".data" if external else None,
        callback=(lambda tensor, _: wrote(tensor.nbytes)) if external else None,
        alignment=ALIGNMENT,
    )


def _stored(tensor: Tensor, name: str, permutation: tuple[int, ...]) -> ir.LazyTensor:
    dtype = tensor_adapters.from_torch_dtype(tensor.dtype)
    shape = ir.Shape([tensor.shape[axis] for axis in permutation])
    return ir.LazyTensor(partial(_read, tensor, name, permutation), dtype=dtype, shape=shape, name=name)


def _read(tensor: Tensor, name: str, permutation: tuple[int, ...]) -> ir.TensorProtocol:
    value = materialized(tensor).permute(permutation).contiguous()
    return tensor_adapters.TorchTensor(value, name=name)
