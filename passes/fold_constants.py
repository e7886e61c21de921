"""Compute at compile time what no input can change."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from evla_compile.graph.contract import GraphPass, add_tensor, get_tensor


@dataclass(frozen=True, kw_only=True)
class FoldConstants(GraphPass):
    """Replace every node that depends on weights and constants alone by its value, exact.

    After unrolling and specialisation these are the timestep embeddings, the embedded "no condition" of classifier-free
    guidance, the rotary tables, prefix tokens and slices of positional embeddings. Nodes that compute the same from the
    same constants share one value. A stage stays a node, and so does what reads it: `ExposeStages` finds it by name.
    Refuses nothing: what depends on a symbolic size is not constant, and stays.
    """

    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Evaluate the constant nodes; values that other nodes read become buffers, equal ones one buffer."""
        graph = gm.graph
        values: dict[fx.Node, Any] = {n: get_tensor(gm, str(n.target)) for n in graph.find_nodes(op="get_attr")}
        twins: dict[str, fx.Node] = {}
        twin = {node: twins.setdefault(str(node.target), node) for node in values}
        folded: list[fx.Node] = []
        with torch.no_grad():
            for node in graph.nodes:
                if node.op != "call_function" or "stage" in node.meta:
                    continue
                if all(read in values for read in node.all_input_nodes):
                    call = (node.args, dict(node.kwargs))
                    twin[node] = twins.setdefault(f"{node.target} {fx.map_arg(call, twin.__getitem__)}", node)
                    args, kwargs = fx.map_arg(call, values.__getitem__)
                    values[node] = values[twin[node]] if twin[node] in values else node.target(*args, **kwargs)
                    folded.append(node)
        inner, constants = set(folded), dict[fx.Node, fx.Node]()
        for node in folded:
            if isinstance(values[node], torch.Tensor) and not inner.issuperset(node.users):
                if twin[node] not in constants:
                    constants[twin[node]] = _add_constant(gm, twin[node], values[node])
                node.replace_all_uses_with(constants[twin[node]], delete_user_cb=lambda user: user not in inner)
        return len(folded)


def _add_constant(gm: fx.GraphModule, node: fx.Node, value: torch.Tensor) -> fx.Node:
    """Return a new node in front of `node` that reads `value`."""
    # cloned, so that a slice does not keep the memory of the tensor that it was cut from
    name = add_tensor(gm, node.name, value.clone(memory_format=torch.contiguous_format))
    with gm.graph.inserting_before(node):
        constant = gm.graph.get_attr(name)
    constant.meta["nn_module_stack"] = node.meta.get("nn_module_stack", {})
    return constant
