"""Weights and operations of a graph, by component of the policy."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, fx

from evla_compile.graph.contract import get_tensor
from evla_compile.graph.flops import Component, component_of, graph_flops, shape_of
from evla_compile.graph.sites import is_call, module_path

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class Footprint:
    """Weights and operations of some nodes of a graph for one call."""

    ops: int
    """Operator nodes."""
    flops: int
    """Floating-point operations executed: convention `all` of `flops`."""
    paper_flops: int
    """Floating-point operations as EfficientVLA counts them: convention `paper` of `flops`."""
    parameters: int
    """Number of weights, folded constants included."""
    weight_bytes: int
    """Bytes of the weights."""
    read_bytes: int
    """Bytes of the weights that a call must read: of an embedding table, the rows of its tokens alone."""

    def __add__(self, other: Self) -> Self:
        return type(self)(**{name: getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__})

    def __mul__(self, times: int) -> Self:
        return type(self)(**{name: getattr(self, name) * times for name in self.__dataclass_fields__})


def footprint(gm: fx.GraphModule, nodes: Sequence[fx.Node]) -> Footprint:
    """Return the operations of operator nodes of `gm`, and the weights that these nodes alone read."""
    inside, tensors, read = set(nodes), dict[int, Tensor](), dict[int, int]()
    for node in nodes:
        for source in node.all_input_nodes:
            if source.op == "get_attr" and inside.issuperset(source.users):
                tensor = get_tensor(gm, str(source.target))
                gathered = all(is_call(user, aten.embedding.default) for user in source.users)
                numbers = math.prod(shape_of(node)) if gathered else tensor.numel()
                tensors[id(tensor)], read[id(tensor)] = tensor, numbers * tensor.element_size()
    return Footprint(
        ops=len(nodes),
        flops=graph_flops(nodes, "all"),
        paper_flops=graph_flops(nodes, "paper"),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        weight_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        read_bytes=sum(read.values()),
    )


def footprint_by_component(gm: fx.GraphModule) -> dict[Component, Footprint]:
    """Return the footprint of each component of a policy's graph; together they are the graph's."""
    nodes: dict[Component, list[fx.Node]] = {"vision": [], "language": [], "action": []}
    for node in gm.graph.nodes:
        if node.op == "call_function":
            nodes[component_of(module_path(node))].append(node)
    return {component: footprint(gm, inside) for component, inside in nodes.items()}
