"""Make every size a literal integer."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils import _pytree as pytree

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, propagate
from evla_compile.graph.sites import input_node
from evla_compile.settings.anatomy import INPUT_IDS

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class SpecializeShapes(GraphPass):
    """Fix the text budget and fold every size that follows from it to an integer, exact.

    It runs after every pass that changes shapes: engines need literal sizes, and `evla_compile.verification` checks
    that all are. Refuses a graph that has another static text budget already, and a size that depends on data, by the
    name of its node.
    """

    exact: ClassVar[bool] = True

    text_tokens: int
    """Static text budget (T) in tokens."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Recompute all values with a static text length and replace the scalar ones by integers."""
        graph = gm.graph
        text = input_node(graph, INPUT_IDS)
        given = text.meta["val"].shape[1]
        if isinstance(given, int) and given != self.text_tokens:
            raise PassError(f"text_tokens={self.text_tokens}: the graph is static already, with {given} text tokens")
        before = [
            n for n in graph.nodes if "val" in n.meta and not isinstance(n.meta["val"], torch.Tensor | tuple | list)
        ]
        mode = FakeTensorMode(shape_env=ShapeEnv())  # a size that depends on data becomes a symbol in it
        for node in graph.nodes:
            old = node.meta.pop("val", None)
            node.meta.pop("tensor_meta", None)  # symbolic shapes from torch.export, which nothing keeps up to date
            if node.op == "placeholder":
                shape = (old.shape[0], self.text_tokens) if node is text else old.shape
                with mode:
                    node.meta["val"] = torch.empty([int(size) for size in shape], dtype=old.dtype, device=old.device)
        propagate(gm)
        for node in graph.nodes:
            if _is_symbolic(node.meta.get("val")):
                raise PassError(
                    f"{node.name} = {node.format_node()}: its size depends on data and cannot be made static"
                )
        for node in before:
            node.replace_all_uses_with(node.meta["val"])
            graph.erase_node(node)
        return len(before)


def _is_symbolic(value: object) -> bool:
    leaves = pytree.tree_leaves(value)
    sizes = [size for leaf in leaves for size in (leaf.shape if isinstance(leaf, torch.Tensor) else [leaf])]
    return any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes)
