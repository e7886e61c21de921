"""Floating-point operations of a graph, in two conventions.

`paper` counts as EfficientVLA (arXiv 2506.10100) did for its figures, with a profiler of modules, which does not see
the products within fused attention. `all` counts everything that is executed:

=====================================================  ===================  ===================
per                                                    `paper`              `all`
=====================================================  ===================  ===================
multiply-accumulate of a linear layer or convolution   2, biases free       2, biases free
element of a layer norm                                5, 4 without affine  5, 4 without affine
element of a GELU                                      1                    1
multiply-accumulate of attention or another product    -                    2
score of a softmax, in fused attention too             -                    5
output element of any other pointwise operator         -                    1
input element of a reduction                           -                    1
=====================================================  ===================  ===================

Attention counts with all pairs of query and key, causal or not, as `torch.utils.flop_counter` does. Operators that
torch tags as pointwise or as reductions count if their arithmetic is floating-point. Copies, casts, gathers, sorts and
embeddings are free. A symbolic size counts with the value that it had at capture.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

from evla_compile.settings.anatomy import COGACT

aten = torch.ops.aten

Convention: TypeAlias = Literal["paper", "all"]
"""What counts; see the table above."""

Component: TypeAlias = Literal["vision", "language", "action"]
"""Towers and projector; decoder, language head and the selection of tokens; the denoising loop with its sampler."""

_COMPONENTS: Mapping[str, Component] = MappingProxyType(
    {
        COGACT.vision: "vision",
        COGACT.projector: "vision",
        COGACT.language: "language",
        "select_tokens": "language",
        "": "language",  # the policy itself: picking the cognition token
        COGACT.action_model: "action",
        COGACT.denoising: "action",
    }
)


def flops_by_component(gm: fx.GraphModule, convention: Convention = "all") -> dict[Component, int]:
    """Return the floating-point operations of a policy's graph by component; together they are those of the graph.

    Raises:
        ValueError: an operator that counts belongs to no component, or the convention is unknown.
    """
    counts: dict[Component, int] = dict.fromkeys(get_args(Component), 0)
    for node in gm.graph.nodes:
        if flops := node_flops(node, convention):
            stack = node.meta.get("nn_module_stack")
            counts[component_of(next(reversed(stack.values()))[0] if stack else "")] += flops
    return counts


def component_of(path: str) -> Component:
    """Return the component of a policy that the module or the weight at a dotted path belongs to.

    Raises:
        ValueError: it belongs to none.
    """
    root = path.partition(".")[0]
    if root not in _COMPONENTS:
        raise ValueError(f"path {path!r}: expected one under {', '.join(_COMPONENTS)}; is this the graph of a policy?")
    return _COMPONENTS[root]


def graph_flops(nodes: Iterable[fx.Node], convention: Convention = "all") -> int:
    """Return the floating-point operations of `nodes`, which must have their values in `meta["val"]`.

    Raises:
        ValueError: the convention is unknown.
    """
    return sum(node_flops(node, convention) for node in nodes)


def node_flops(node: fx.Node, convention: Convention = "all") -> int:
    """Return the floating-point operations of one node; 0 for what is free.

    Raises:
        ValueError: the convention is unknown.
    """
    if convention not in get_args(Convention):
        raise ValueError(f"convention={convention!r}: expected one of {', '.join(get_args(Convention))}")
    if node.op != "call_function" or (convention == "paper" and node.target not in _PAPER):
        return 0
    return product_flops(node) + _ELEMENTWISE.get(node.target, _tagged)(node)


def product_flops(node: fx.Node) -> int:
    """Return the operations of one node if it is a matrix product, fused attention's two included, else 0."""
    formula = _PRODUCTS.get(node.target) if node.op == "call_function" else None
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
    return 2 * math.prod(queries[:-1]) * keys[-2] * (queries[-1] + values[-1])


def _attention_softmax(node: fx.Node) -> int:
    queries, keys = (shape_of(argument) for argument in node.args[:2])
    return 5 * math.prod(queries[:-1]) * keys[-2]


def _softmax(node: fx.Node) -> int:
    return 5 * math.prod(shape_of(node))  # maximum, difference, exponential, sum, quotient


def _layer_norm(node: fx.Node) -> int:
    affine = len(node.args) > 2 and node.args[2] is not None
    return (5 if affine else 4) * math.prod(shape_of(node))


def _tagged(node: fx.Node) -> int:
    tags = node.target.tags if isinstance(node.target, torch._ops.OpOverload) else []
    if torch.Tag.reduction in tags:
        return math.prod(shape_of(node.args[0])) if _is_floating(node.args[0]) else 0
    if torch.Tag.pointwise in tags and node.target is not aten.clone.default:  # torch tags the copy as well
        return math.prod(shape_of(node)) if _is_floating(node) else 0
    return 0


def _is_floating(argument: object) -> bool:
    value = argument.meta["val"] if isinstance(argument, fx.Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()


_Formulas: TypeAlias = Mapping[object, Callable[[fx.Node], int]]

_PRODUCTS: _Formulas = MappingProxyType(
    {
        aten.linear.default: _linear,
        aten.conv2d.default: _convolution,
        aten.matmul.default: _matmul,
        aten.scaled_dot_product_attention.default: _attention,
    }
)
_ELEMENTWISE: _Formulas = MappingProxyType(
    {
        aten.layer_norm.default: _layer_norm,
        aten.softmax.int: _softmax,
        aten.scaled_dot_product_attention.default: _attention_softmax,
    }
)
"""What is counted beside matrix products, for operators that torch does not tag."""
_PAPER = frozenset({aten.linear.default, aten.conv2d.default, aten.layer_norm.default, aten.gelu.default})
"""Operators that the paper's profiler counted."""
