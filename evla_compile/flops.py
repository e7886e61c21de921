"""Floating-point operations of a graph: two per multiply-accumulate of linear layers, convolutions and attention.

Attention products are counted on the full square, causal or not, as `torch.utils.flop_counter` does; element-wise
arithmetic, norms and gathers are left out. A symbolic size counts with the value that it had at capture.
"""

import math
from collections.abc import Callable, Iterable

import torch
from torch import fx

aten = torch.ops.aten


def graph_flops(nodes: Iterable[fx.Node]) -> int:
    """Return the floating-point operations of `nodes`, which must carry their values in `meta["val"]`."""
    return sum(node_flops(node) for node in nodes)


def node_flops(node: fx.Node) -> int:
    """Return the floating-point operations of one node; 0 for what is not a matrix product."""
    formula = _FORMULAS.get(node.target) if node.op == "call_function" else None
    return formula(node) if formula else 0


def shape_of(argument: object) -> tuple[int, ...]:
    """Return the shape of a node's tensor value, symbolic sizes replaced by their value at capture."""
    if not isinstance(argument, fx.Node):
        raise TypeError(f"expected a graph node, found {argument!r}")
    return tuple(size if isinstance(size, int) else int(size.node.hint) for size in argument.meta["val"].shape)


def _linear(node: fx.Node) -> int:
    rows = math.prod(shape_of(node.args[0])[:-1])
    return 2 * rows * math.prod(shape_of(node.args[1]))


def _convolution(node: fx.Node) -> int:
    batch, _, *spatial = shape_of(node)
    return 2 * batch * math.prod(spatial) * math.prod(shape_of(node.args[1]))


def _matmul(node: fx.Node) -> int:
    return 2 * math.prod(shape_of(node)) * shape_of(node.args[0])[-1]


def _attention(node: fx.Node) -> int:
    queries, keys, values = (shape_of(argument) for argument in node.args[:3])
    pairs = math.prod(queries[:-1]) * keys[-2]
    return 2 * pairs * (queries[-1] + values[-1])


_FORMULAS: dict[object, Callable[[fx.Node], int]] = {
    aten.linear.default: _linear,
    aten.conv2d.default: _convolution,
    aten.matmul.default: _matmul,
    aten.scaled_dot_product_attention.default: _attention,
}
