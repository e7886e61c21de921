"""The weights of an ONNX model: absent while its graph is built, then read and written to its file one at a time."""

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
"""Large tensors begin at multiples of this many bytes in a data file, so that every system can map them."""


def leave_out_weights(program: ExportedProgram) -> dict[str, Tensor]:
    """Replace the tensors of `program` by fake ones, which have shape and dtype but no data; return them by name."""
    weights: dict[str, Tensor] = dict(program.state_dict)
    with FakeTensorMode():
        for name, tensor in weights.items():
            program.state_dict[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    return weights


def empty_initializers(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Mark the values of these initializers as unknown, so that rewrites of `model` do not use them."""
    for name in sorted(model.graph.initializers.keys() & weights.keys()):
        model.graph.initializers[name].const_value = None


def put_weights_back(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Give the initializers of `model` their tensors, each read only when it is written.

    torch's linear layers multiply by a transposed weight, ONNX's MatMul by a matrix as it is. So a weight that the
    graph only transposes is stored transposed, and the Transpose removed.
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
    """Return `model` as a protobuf message whose weights refer to a file that does not exist.

    It is for inspecting a graph without reading its weights. `model` loses its weights.
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
        external: whether the weights are written to a separate file.
        wrote: called with the number of bytes of each tensor when it is written to that file.
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
