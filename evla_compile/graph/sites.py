"""Find the nodes that a rewrite changes: by operator and module path, by stage name, as decoder layers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import Value
from evla_compile.settings.anatomy import COGACT

aten = torch.ops.aten


def argument(node: fx.Node, index: int) -> fx.Node:
    """Return a positional argument of `node` that must be a node itself.

    Raises:
        PassError: it is not.
    """
    value = node.args[index] if index < len(node.args) else None
    if not isinstance(value, fx.Node):
        raise PassError(f"{node.format_node()}: expected a node as argument {index}, found {value!r}")
    return value


def mark_stage(value: Value, name: str) -> Value:
    """Name the value of a proxy as a stage, which `stage_node` finds; return the proxy."""
    value.node.meta["stage"] = name
    return value


def stage_node(graph: fx.Graph, name: str) -> fx.Node:
    """Return the node whose value is the stage `name`.

    Raises:
        PassError: the graph has no such stage; the message lists those that it has.
    """
    stages: dict[str, fx.Node] = {node.meta["stage"]: node for node in graph.nodes if "stage" in node.meta}
    if name not in stages:
        known = sorted({re.sub(r"\.\d+$", ".N", stage) for stage in stages})
        raise PassError(f"the graph has no stage {name!r}; it has {known}")
    return stages[name]


def verified_stages(graph: fx.Graph) -> tuple[str, ...]:
    """Return the stages that lowerings are compared at, in graph order: floating-point, and not the graph's output."""
    results = set(graph.output_node().all_input_nodes)
    found = [node for node in graph.nodes if "stage" in node.meta and node not in results]
    return tuple(n.meta["stage"] for n in found if COGACT.is_verified(n.meta["stage"]))


def is_call(node: object, *targets: object) -> bool:
    """Tell whether `node` is a node that calls one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def module_path(node: fx.Node) -> str:
    """Return the dotted path of the innermost module that `node` came from; "" for the policy itself."""
    stack = node.meta.get("nn_module_stack")
    return next(reversed(stack.values()))[0] if stack else ""


def nodes_under(graph: fx.Graph, path: str) -> list[fx.Node]:
    """Return the operator nodes that came from the module at `path` or below it, in graph order."""
    return [
        node
        for node in graph.nodes
        if node.op == "call_function" and (module_path(node) == path or module_path(node).startswith(path + "."))
    ]


def indexed_modules(graph: fx.Graph, path: str) -> dict[int, list[fx.Node]]:
    """Return the operator nodes of every numbered module below `path`, by ascending index."""
    found: dict[int, list[fx.Node]] = {}
    for node in nodes_under(graph, path):
        index = module_path(node).removeprefix(path + ".").split(".")[0]
        found.setdefault(int(index), []).append(node)
    return dict(sorted(found.items()))


def input_node(graph: fx.Graph, name: str) -> fx.Node:
    """Return the graph's input `name`.

    Raises:
        PassError: there is none.
    """
    inputs: dict[str, fx.Node] = {str(node.target): node for node in graph.find_nodes(op="placeholder")}
    if name not in inputs:
        raise PassError(f"the graph has no input {name!r}; its inputs are {sorted(inputs)}")
    return inputs[name]


@dataclass(frozen=True, slots=True)
class VisionBlock:
    """One block of a vision tower, found in a graph."""

    path: str
    """Its module path."""
    attended: fx.Node
    """Its hidden states behind the attention, residual included, [B,N,D]."""
    up: fx.Node
    """The linear node of its MLP's first layer."""
    down: fx.Node
    """That of the second."""
    scale: fx.Node | None
    """The vector [D] that the MLP's output is multiplied by; None where the tower has none."""
    exit: fx.Node
    """The hidden states that leave it, residual included."""

    @property
    def neurons(self) -> fx.Node:
        """The activations of its MLP's neurons, [B,N,M]."""
        return argument(self.down, 0)


def vision_blocks(graph: fx.Graph) -> tuple[VisionBlock, ...]:
    """Return the blocks of all vision towers, in the order of the graph.

    Raises:
        PassError: a block is not of the form of `evla_compile.families.cogact.model.vision.Block`.
    """
    return tuple(
        _vision_block(f"{tower}.blocks.{index}", nodes)
        for tower in COGACT.vision_towers
        for index, nodes in indexed_modules(graph, f"{tower}.blocks").items()
    )


def _vision_block(path: str, nodes: list[fx.Node]) -> VisionBlock:
    _, exit_ = residual_ends(path, nodes)
    attended, added = argument(exit_, 0), argument(exit_, 1)
    up, down = (_linear(path, nodes, f"mlp.{name}") for name in ("fc1", "fc2"))
    scale = argument(added, 1) if is_call(added, aten.mul.Tensor) and argument(added, 0) is down else None
    if attended not in nodes or (added is not down and scale is None):
        raise PassError(f"{path}: expected the MLP's output, scaled or not, to be added to what leaves the attention")
    return VisionBlock(path, attended, up, down, scale, exit_)


def _linear(path: str, nodes: Sequence[fx.Node], suffix: str) -> fx.Node:
    """Return the single linear node of the submodule `suffix` of the module at `path`.

    Raises:
        PassError: the module has no such submodule, or it is not one linear node.
    """
    found = [n for n in nodes if module_path(n) == f"{path}.{suffix}" and is_call(n, aten.linear.default)]
    if len(found) != 1:
        raise PassError(f"{path}: expected one linear node in {suffix}, found {len(found)}")
    return found[0]


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """One decoder layer, found in a graph."""

    index: int
    """Its index in the checkpoint."""
    nodes: tuple[fx.Node, ...]
    """Its operator nodes in graph order."""
    entry: fx.Node
    """The hidden states that enter it, [B,S,D]."""
    exit: fx.Node
    """The hidden states that leave it, residual included."""
    attention: fx.Node
    """Its fused attention."""

    @property
    def path(self) -> str:
        """Module path of the layer."""
        return f"{COGACT.decoder_layers}.{self.index}"

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """Nodes outside the layer that it reads, weights excluded, each once in order of use."""
        inside = set(self.nodes)
        read = dict.fromkeys(argument for node in self.nodes for argument in node.all_input_nodes)
        return tuple(node for node in read if node not in inside and node.op != "get_attr")

    @property
    def length(self) -> fx.Node:
        """The symbolic sequence length that the layer's views use.

        Raises:
            PassError: there is not exactly one; the graph's shapes are static already.
        """
        sizes = [node for node in self.inputs if not isinstance(node.meta["val"], Tensor)]
        if len(sizes) != 1:
            raise PassError(f"{self.path}: expected one symbolic sequence length, found {[n.name for n in sizes]}")
        return sizes[0]

    @property
    def rotary_tables(self) -> tuple[fx.Node, ...]:
        """The rotary cosines and sines, [1 or B,S,E] each with the head width E.

        Raises:
            PassError: the layer does not read exactly these two tensors beside its hidden states.
        """
        tables = [n for n in self.inputs if isinstance(n.meta["val"], Tensor) and n is not self.entry]
        if len(tables) != 2:
            raise PassError(f"{self.path}: expected two rotary tables, found {[n.name for n in tables]}")
        return tuple(tables)

    def named(self, suffix: str) -> fx.Node:
        """Return the single linear node of the submodule `suffix`, for instance "mlp.down_proj".

        Raises:
            PassError: the layer has no such submodule, or it is not one linear node.
        """
        found = [n for n in self.nodes if module_path(n) == f"{self.path}.{suffix}" and is_call(n, aten.linear.default)]
        if len(found) != 1:
            raise PassError(f"decoder layer {self.index}: expected one linear node in {suffix}, found {len(found)}")
        return found[0]


def decoder_layers(graph: fx.Graph) -> tuple[DecoderLayer, ...]:
    """Return the decoder layers that the graph still has, in order.

    Raises:
        PassError: there is none, or one is not in the form of a residual layer with one fused attention.
    """
    found = indexed_modules(graph, COGACT.decoder_layers)
    if not found:
        raise PassError(f"no decoder layer under {COGACT.decoder_layers!r}: expected the captured graph of a policy")
    return tuple(_decoder_layer(index, nodes) for index, nodes in found.items())


def _decoder_layer(index: int, nodes: list[fx.Node]) -> DecoderLayer:
    path = f"{COGACT.decoder_layers}.{index}"
    entry, exit_ = residual_ends(path, nodes)
    attention = [node for node in nodes if is_call(node, aten.scaled_dot_product_attention.default)]
    if len(attention) != 1:
        raise PassError(f"{path}: expected one fused attention, found {len(attention)}")
    return DecoderLayer(index, tuple(nodes), entry, exit_, attention[0])


def residual_ends(path: str, nodes: list[fx.Node]) -> tuple[fx.Node, fx.Node]:
    """Return what enters and what leaves the transformer block at `path`, which adds to its residual stream twice.

    Raises:
        PassError: the block is not of that form.
    """
    adds = [node for node in nodes if module_path(node) == path and is_call(node, aten.add.Tensor)]
    if len(adds) != 2:
        raise PassError(f"{path}: expected two residual adds, found {len(adds)}")
    entries = [argument for argument in adds[0].all_input_nodes if argument not in nodes]
    if len(entries) != 1:
        raise PassError(f"{path}: its first residual add has {len(entries)} inputs from outside, expected 1")
    return entries[0], adds[1]
