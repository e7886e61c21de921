"""Find the call of a policy in a Dynamo graph, between two marker nodes that `CogACT.sample` writes, and replace it.

The values that reach the policy need not be the graph's inputs: a compiled function may compute them from its own
arguments, and may compute further with the samples.
"""

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from evla_compile.errors import UnsupportedModelError

ADVICE = "compile the policy by itself, policy.compile(backend='evla'), and do the rest outside of it"
"""Advice for a function with more than one call of a policy."""

_OPERATORS = ("iadd", "iand", "iconcat", "ifloordiv", "ilshift", "imatmul", "imod", "imul", "ior", "ipow", "irshift")
_WRITING = {getattr(operator, name) for name in (*_OPERATORS, "isub", "itruediv", "ixor", "setitem", "delitem")}
"""Functions of `operator` that write into their first argument."""


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # torch left it so
def enter_policy(
    image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor, function_modes: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mark the values that a policy is called with, as one node of the Dynamo graph, and return them.

    Args:
        image: uint8 [B,S,S,3].
        input_ids: int64 [B,T].
        text_length: int64 [B].
        noise: float32 [B,A,F].
        function_modes: how many modes intercept torch functions during the call.
    """
    return image, input_ids, text_length, noise


@torch.compiler.allow_in_graph  # type: ignore[untyped-decorator]  # torch left it so
def leave_policy(samples: Tensor) -> Tensor:
    """Mark a policy's result, float32 [B,A,F], as one node of the Dynamo graph, and return it."""
    return samples


@dataclass(frozen=True, slots=True)
class PolicyCall:
    """The one call of a policy in a graph."""

    enter: fx.Node
    """The mark that it begins with."""
    leave: fx.Node
    """The mark that it ends with."""
    between: tuple[fx.Node, ...]
    """All nodes from one to the other, the marks excluded, in graph order."""

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Image, input ids, text length and noise as they reach the policy."""
        return tuple(node for node in self.enter.args[:4] if isinstance(node, fx.Node))

    @property
    def computed(self) -> list[fx.Node]:
        """Nodes that the samples are computed from, in graph order: weights, and what follows the marked inputs."""
        entered, needed = set(self.enter.users), {self.leave}
        for node in (self.leave, *reversed(list(_before(self.leave)))):
            if node in needed and node not in entered:
                needed.update(node.all_input_nodes)
        return [node for node in _before(self.leave) if node in needed and node not in entered]


def find_policy_call(graph: fx.Graph) -> PolicyCall:
    """Return the call of a policy in a Dynamo graph.

    Raises:
        UnsupportedModelError: there is none, or more than one, or it writes into a tensor.
    """
    enters, leaves = (graph.find_nodes(op="call_function", target=mark) for mark in (enter_policy, leave_policy))
    if len(enters) != 1 or len(leaves) != 1:
        raise UnsupportedModelError(
            f"backend evla was handed a graph with {len(enters)} calls of a CogACT policy, expected one whole call of"
            f" policy(...) or policy.sample(...): {ADVICE}"
        )
    nodes = list(graph.nodes)
    first, last = nodes.index(enters[0]), nodes.index(leaves[0])
    between = tuple(nodes[first + 1 : last])
    _refuse_writes(between)
    return PolicyCall(enters[0], leaves[0], between)


def replace_policy_call(gm: fx.GraphModule, run: Callable[..., Tensor], rest: Sequence[int]) -> fx.GraphModule:
    """Return a copy of a Dynamo graph that calls `run` instead of the policy; all else in it is unchanged.

    Args:
        gm: the graph, with one call of a policy.
        run: takes image, input ids, text length and noise as they reach the policy, then the graph's inputs at the
            positions `rest`, and returns the samples.
        rest: positions of inputs.

    Raises:
        UnsupportedModelError: a node behind the policy reads a tensor that is computed within it, or a node within it
            writes into a tensor.
    """
    replaced = fx.GraphModule(gm, _copy(gm.graph))
    graph = replaced.graph
    call, placeholders = find_policy_call(graph), list(graph.find_nodes(op="placeholder"))
    replaced.add_module("policy", _Call(run))
    with graph.inserting_before(call.leave):
        samples = graph.call_module("policy", (*call.inputs, *(placeholders[position] for position in rest)))
    samples.meta = dict(call.leave.meta)
    call.leave.replace_all_uses_with(samples)
    for node in (call.leave, *reversed(call.between), call.enter):
        if not node.users:
            graph.erase_node(node)
        elif isinstance(node.meta.get("example_value"), Tensor):
            raise UnsupportedModelError(
                f"backend evla was handed a graph that reads {node.name} within the policy, through a forward hook for"
                " instance, and the compiled policy has no such value: remove the hook"
            )
    graph.lint()
    replaced.recompile()
    return replaced


def _refuse_writes(nodes: Sequence[fx.Node]) -> None:
    """Refuse nodes that write into a tensor: later nodes read what they wrote without being their users.

    Raises:
        UnsupportedModelError: there is one.
    """
    for node in nodes:
        if _writes(node):
            raise UnsupportedModelError(
                f"backend evla was handed a graph in which {node.name} writes into a tensor within the policy,"
                " through a forward hook for instance, and the compiled policy would leave that out: remove the hook"
            )


def _writes(node: fx.Node) -> bool:
    """Tell whether a node of a Dynamo graph changes one of its arguments, by torch's naming of such operators."""
    if "out" in node.kwargs or node.kwargs.get("inplace"):
        return True
    if node.op == "call_method":
        name = str(node.target)
        return name in {f"__{written.__name__}__" for written in _WRITING} or _named_in_place(name)
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if getattr(node.target, "__module__", "") == operator.add.__module__:  # and_, is_ and the like write nothing
        return node.target in _WRITING
    return _named_in_place(getattr(node.target, "__name__", ""))


def _named_in_place(name: str) -> bool:
    return name.endswith("_") and not name.endswith("__")


class _Call(nn.Module):
    """A function as a module, since a graph can call modules alone."""

    def __init__(self, run: Callable[..., Tensor]) -> None:
        super().__init__()
        self._run = run

    def forward(self, *arguments: Any) -> Tensor:
        return self._run(*arguments)


def _copy(graph: fx.Graph) -> fx.Graph:
    copied = fx.Graph()
    copied.output(copied.graph_copy(graph, val_map={}))
    return copied


def _before(last: fx.Node) -> list[fx.Node]:
    nodes = list(last.graph.nodes)
    return nodes[: nodes.index(last)]
