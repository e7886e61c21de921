"""The pass contract: `GraphPass`, `PassReport`, and how a graph is copied, measured and kept consistent.

A graph here is a flat `torch.fx.GraphModule` of ATen operators, as `capture` returns it. Every node has in
`meta["nn_module_stack"]` the module that it came from and in `meta["val"]` its value as a fake tensor (symbolic sizes
included), which `propagate` keeps up to date; `sites` finds what a rewrite changes.
"""

import logging
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, count
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode

from evla_compile.errors import PassError
from evla_compile.graph.deferred import DeferredWeight
from evla_compile.graph.flops import graph_flops
from evla_compile.graph.torch_state import own_torch_state

logger = logging.getLogger(__name__)
aten = torch.ops.aten

Value: TypeAlias = Any
"""An `fx.Proxy`: an ATen operator called on proxies writes a node and returns a proxy; torch's types do not say so."""

WRITTEN_BY = "evla_compile.passes."
"""Prefix of the module type that the module stack names for a node which a pass wrote; the pass's name follows."""

Wrap: TypeAlias = Callable[[fx.Node], Value]
"""Turns a node into a proxy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GraphStats:
    """Size of a graph."""

    ops: int
    """Operator nodes."""
    flops: int
    """Floating-point operations of one call, everything executed (see `flops`)."""
    paper_flops: int
    """The same, counted as EfficientVLA did."""
    weight_bytes: int
    """Bytes of all distinct tensors that the graph reads."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PassReport:
    """What one pass did."""

    name: str
    """The pass with its settings."""
    exact: bool
    """Whether the pass keeps the policy's outputs up to rounding."""
    changes: int
    """Sites rewritten."""
    before: GraphStats
    """Size of the graph that came in."""
    after: GraphStats
    """Size of the graph that went out."""


class GraphPass(ABC):
    """One rewrite of a captured graph; subclasses are frozen dataclasses whose fields are the whole configuration."""

    exact: ClassVar[bool]
    """Whether the rewrite keeps the outputs up to rounding."""

    @abstractmethod
    def rewrite(self, gm: fx.GraphModule) -> int:
        """Rewrite `gm` in place and return the number of sites changed.

        New nodes may be left without `meta["val"]`; nodes whose shape changes without a new input must lose theirs.

        Raises:
            PassError: a site that was asked for does not exist.
        """

    @own_torch_state()
    def __call__(self, gm: fx.GraphModule) -> tuple[fx.GraphModule, PassReport]:
        """Return a rewritten copy of `gm`, which shares its weights, and the report; `gm` itself is never touched.

        Raises:
            PassError: a site that was asked for does not exist.
        """
        rewritten = copy_graph(gm)
        known = set(rewritten.graph.nodes)
        changes = self.rewrite(rewritten)
        _sign([node for node in rewritten.graph.nodes if node not in known], type(self).__name__)
        remove_dead_nodes(rewritten.graph)
        propagate(rewritten)
        rewritten.graph.lint()
        # A new module takes over only the tensors that the graph refers to: here deleted weights are dropped.
        result = copy_graph(rewritten)
        report = PassReport(
            name=repr(self), exact=self.exact, changes=changes, before=measure(gm), after=measure(result)
        )
        logger.info("%s: %s changes, %s -> %s ops", report.name, changes, report.before.ops, report.after.ops)
        return result, report


def _sign(nodes: list[fx.Node], name: str) -> None:
    """Record in the module stack of nodes that a pass wrote, in place of the module's type, the name of the pass."""
    for node in nodes:
        stack = node.meta.get("nn_module_stack")
        if stack:
            key, (path, kind) = next(reversed(stack.items()))
            if kind == path:  # as `inserting` writes it; a copied node keeps the type of its original
                node.meta["nn_module_stack"] = {**stack, key: (path, f"{WRITTEN_BY}{name}")}


def copy_graph(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a copy of `gm` that shares its tensors, those alone that its graph reads."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, val_map={})
    graph.output(output)
    graph.output_node().meta = dict(gm.graph.output_node().meta)
    copied = fx.GraphModule(gm, graph)
    copied.meta = dict(gm.meta)
    return copied


def measure(gm: fx.GraphModule) -> GraphStats:
    """Return the size of `gm`."""
    tensors = {id(tensor): tensor for _, tensor in weights(gm)}
    return GraphStats(
        ops=sum(node.op == "call_function" for node in gm.graph.nodes),
        flops=graph_flops(gm.graph.nodes),
        paper_flops=graph_flops(gm.graph.nodes, "paper"),
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
    )


def weights(gm: fx.GraphModule) -> Iterator[tuple[str, Tensor]]:
    """Yield the name and value of every tensor that the graph of `gm` reads, each name once, in graph order."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in seen:
            seen.add(node.target)
            yield str(node.target), get_tensor(gm, str(node.target))


def get_tensor(gm: fx.GraphModule, name: str) -> Tensor:
    """Return the tensor of `gm` with a dotted name."""
    tensor: Tensor = operator.attrgetter(name)(gm)
    return tensor


def replace_tensor(gm: fx.GraphModule, name: str, tensor: Tensor) -> None:
    """Replace the tensor of `gm` with a dotted name; copies of `gm` keep the old one."""
    holder, _, leaf = name.rpartition(".")
    module = gm.get_submodule(holder)
    delattr(module, leaf)
    module.register_buffer(leaf, tensor)
    for node in gm.graph.find_nodes(op="get_attr", target=name):
        node.meta.pop("val", None)


@own_torch_state()
def materialize(gm: fx.GraphModule) -> None:
    """Replace the deferred weights of `gm` by their values; copies of `gm` keep the deferred ones."""
    for name, tensor in list(weights(gm)):
        if isinstance(tensor, DeferredWeight):
            holder, _, leaf = name.rpartition(".")
            gm.get_submodule(holder).register_buffer(leaf, tensor.compute())


def add_tensor(gm: fx.GraphModule, name: str, tensor: Tensor) -> str:
    """Register `tensor` as a buffer of `gm` under an unused name derived from `name`, and return that name."""
    flat = "held_" + name.replace(".", "_")
    free = next(name for name in chain([flat], (f"{flat}_{i}" for i in count(1))) if not hasattr(gm, name))
    gm.register_buffer(free, tensor)
    return free


@contextmanager
def inserting(graph: fx.Graph, before: fx.Node, path: str) -> Iterator[Wrap]:
    """Write new nodes in front of `before` by calling ATen operators on proxies; they count as the module `path`.

    Yields:
        The function that turns a node into a proxy.
    """
    tracer = fx.proxy.GraphAppendingTracer(graph)
    known = set(graph.nodes)
    with graph.inserting_before(before):
        yield lambda node: fx.Proxy(node, tracer)
    for node in graph.nodes:
        if node not in known:
            node.meta["nn_module_stack"] = {path: (path, path)}


def remove_dead_nodes(graph: fx.Graph) -> None:
    """Erase every node whose value no output needs; inputs stay.

    `Graph.eliminate_dead_code` alone would keep a deleted layer, since it counts fused attention as impure.
    """
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def propagate(gm: fx.GraphModule) -> None:
    """Compute `meta["val"]` of the nodes that lack it and of all that follows from a changed shape or dtype."""
    mode = fake_mode(gm)
    changed: set[fx.Node] = set()
    with mode, enable_python_dispatcher():  # without it, torch 2.11 runs composite operators on concrete sizes alone
        for node in gm.graph.nodes:
            if node.op == "output" or ("val" in node.meta and not changed.intersection(node.all_input_nodes)):
                continue
            value = _fake_value(gm, node, mode)
            if not _same_form(node.meta.get("val"), value):
                changed.add(node)
            node.meta["val"] = value


def fake_mode(gm: fx.GraphModule) -> FakeTensorMode:
    """Return the mode that the fake tensors of `gm` live in."""
    placeholder = next(iter(gm.graph.find_nodes(op="placeholder")))
    mode: FakeTensorMode = placeholder.meta["val"].fake_mode
    return mode


def _fake_value(gm: fx.GraphModule, node: fx.Node, mode: FakeTensorMode) -> Any:
    if node.op == "get_attr":
        tensor = get_tensor(gm, str(node.target))
        if isinstance(tensor, DeferredWeight):  # shape, dtype and device suffice: do not compute the value
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        return mode.from_tensor(tensor, static_shapes=True)
    if node.op != "call_function" or not callable(node.target):
        raise PassError(f"node {node.name}: {node.op} has no value and none can be computed")
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda argument: argument.meta["val"])
    return node.target(*args, **kwargs)


def _same_form(old: object, new: object) -> bool:
    if isinstance(old, Tensor) and isinstance(new, Tensor):
        return old.dtype == new.dtype and old.shape == new.shape
    return isinstance(old, int | torch.SymInt) and isinstance(new, int | torch.SymInt) and bool(old == new)
