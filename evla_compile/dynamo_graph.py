"""Dynamo's graph of a policy in the form of `capture`: ATen operators, the policy's own names, weights as tensors."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from evla_compile.capture import clean, mark_stages
from evla_compile.errors import UnsupportedModelError
from evla_compile.graph import copy_graph, propagate, remove_dead_nodes, weights
from evla_compile.model.policy import ModelSizes
from evla_compile.sites import (
    ACTION_MODEL,
    DECODER_LAYERS,
    DENOISING,
    INPUT_NAMES,
    argument,
    is_call,
    module_path,
    nodes_under,
)
from evla_compile.sizes import infer_sizes

aten = torch.ops.aten


class DynamoGraph(NamedTuple):
    """What Dynamo captured of a policy."""

    graph: fx.GraphModule
    """The whole sampler, unrolled, with the inputs `INPUT_NAMES`."""
    order: tuple[int, ...]
    """Positions of these among the inputs that Dynamo passes."""
    held: dict[str, int]
    """Positions of the weights, by their names in the state dict."""


def read_graph(gm: fx.GraphModule, inputs: Sequence[Any]) -> DynamoGraph:
    """Return Dynamo's graph in the form of `capture`.

    Args:
        gm: Dynamo's graph of torch calls, which takes the weights beside the policy's four inputs.
        inputs: what it was captured with.

    Raises:
        UnsupportedModelError: it is not the graph of a whole `CogACT` and of nothing else.
        ValueError: a setting of the sampler was captured as a variable.
    """
    placeholders = list(gm.graph.find_nodes(op="placeholder"))
    fakes = [node.meta["example_value"] for node in placeholders]

    def interpreted(*values: Any) -> Any:
        with preserve_node_meta():
            return fx.Interpreter(gm).run(*values)

    mode = next(value.fake_mode for value in fakes if isinstance(value, FakeTensor))
    with torch.no_grad(), mode:
        traced = make_fx(interpreted, pre_dispatch=True)(*fakes)
    names = [_name(node) for node in placeholders]
    missing = [name for name in INPUT_NAMES if name not in names]
    if missing:
        raise UnsupportedModelError(
            f"backend evla was handed a graph without the inputs {', '.join(missing)}: it compiles a CogACT policy as a"
            " whole, torch.compile(policy, backend='evla') or policy.compile(backend='evla')"
        )
    remove_dead_nodes(traced.graph)  # steps that were counted out by a variable, for instance
    _check_inputs(traced.graph, names)
    order = tuple(names.index(name) for name in INPUT_NAMES)
    captured = _captured(traced, names, inputs)
    held = {name: names.index(name) for name, _ in weights(captured) if name in names}
    return DynamoGraph(captured, order, held)


def _check_inputs(graph: fx.Graph, names: Sequence[str]) -> None:
    """Refuse inputs beside the four, the weights and the text length: they would be taken for one of these."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    text = placeholders[names.index("input_ids")].meta["val"].shape[1]
    for node, name in zip(placeholders, names, strict=True):
        value = node.meta["val"]
        held = isinstance(value, Tensor) and "." in name
        size = isinstance(value, torch.SymInt) and isinstance(text, torch.SymInt) and value.node.expr == text.node.expr
        if name in INPUT_NAMES or held or size or not node.users:
            continue
        if name in ("ddim_steps", "cfg_scale"):  # Dynamo makes a number an input once it has changed
            raise ValueError(
                f"{name} was captured as a variable, because an earlier call had another: call torch._dynamo.reset(),"
                " then the policy as the configuration says"
            )
        raise UnsupportedModelError(
            f"backend evla was handed a graph with the input {name!r} beside {', '.join(INPUT_NAMES)}:"
            " it compiles a CogACT policy alone, policy.compile(backend='evla'); do the rest outside of it"
        )


def _captured(traced: fx.GraphModule, names: Sequence[str], inputs: Sequence[Any]) -> fx.GraphModule:
    """Return the traced graph with parameters as tensors and the four inputs in their order, cleaned as `capture`'s."""
    root, graph = torch.nn.Module(), fx.Graph()
    values: dict[fx.Node, Any] = {}
    given = dict(zip(names, traced.graph.find_nodes(op="placeholder"), strict=True))
    for name in INPUT_NAMES:
        values[given[name]] = graph.placeholder(name)
        values[given[name]].meta = {"val": given[name].meta["val"]}
    for name, node, tensor in zip(names, given.values(), inputs, strict=True):
        if name in INPUT_NAMES:
            continue
        if isinstance(tensor, Tensor):
            _hold(root, name, tensor.detach())
            values[node] = graph.get_attr(name)
        else:  # the symbolic text length, which Dynamo passes beside the tensors
            values[node] = graph.call_function(aten.sym_size.int, (values[given["input_ids"]], 1))
        values[node].meta = {"val": node.meta["val"]}
    for node in traced.graph.nodes:
        if node.op == "get_attr":
            _hold(root, str(node.target), getattr(traced, str(node.target)))
        if node.op not in ("placeholder", "output") and node.target is not torch._C._set_grad_enabled:
            values[node] = graph.node_copy(node, values.__getitem__)
            values[node].meta["nn_module_stack"] = _stack(node)
    results = traced.graph.output_node().all_input_nodes
    if len(results) != 1:
        raise UnsupportedModelError(
            f"backend evla was handed a graph with {len(results)} outputs, expected the samples: it compiles a CogACT"
            " policy alone, policy.compile(backend='evla'); do the rest outside of it"
        )
    graph.output(values[results[0]])
    captured = fx.GraphModule(root, graph)
    clean(captured)
    mark_stages(captured)
    _name_steps(captured.graph)
    propagate(captured)
    return copy_graph(captured)


def _hold(root: torch.nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if not hasattr(module, part):
            module.add_module(part, torch.nn.Module())
        module = module.get_submodule(part)
    module.register_buffer(leaf, tensor)


def _name(node: fx.Node) -> str:
    """Return the name of one of Dynamo's inputs: of a parameter in the state dict, of an argument in the call.

    Dynamo joins what leads to a parameter, L['self']._modules['projector']._parameters['bias'], to a single word.
    """
    word = re.sub(r"^[lL]_", "", str(node.target)).removesuffix("_")
    _, *modules = word.split("_modules_")
    if not modules:
        return word
    last, _, leaf = modules.pop().rpartition("_parameters_")
    return ".".join([*modules, last, leaf])


def _stack(node: fx.Node) -> dict[str, tuple[str, Any]]:
    """Return a node's module stack with paths as they are below the policy: "L['self'].projector" -> "projector"."""
    stack = node.meta.get("nn_module_stack") or {}
    return {key: (re.sub(r"^L\['\w+'\]\.?", "", path), kind) for key, (path, kind) in stack.items()}


def _name_steps(graph: fx.Graph) -> None:
    """Move the action model's calls, and the sampler's arithmetic behind each, under the paths of denoising steps."""
    step, inside = -1, False
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        path = module_path(node)
        entered = path.split(".", maxsplit=1)[0] == ACTION_MODEL
        step += entered and not inside
        inside = entered
        if step >= 0:
            moved = f"{DENOISING}.{step}" + (f".{path}" if path else "")
            node.meta["nn_module_stack"] = {moved: (moved, moved)}
            if is_call(node, aten.add.Tensor) and not path:
                node.meta["stage"] = f"{DENOISING}.{step}"


def find_sizes(gm: fx.GraphModule) -> ModelSizes:
    """Read a policy's sizes off the shapes of its tensors and attention heads.

    Raises:
        CheckpointError: a tensor that tells a size is missing.
        UnsupportedModelError: a part has no attention.
    """
    shapes = {name: tuple(tensor.shape) for name, tensor in weights(gm)}
    parts = {
        "dino": "vision_backbone.dino_featurizer.blocks.0",
        "siglip": "vision_backbone.siglip_featurizer.blocks.0",
        "llm": f"{DECODER_LAYERS}.0",
        "dit": f"{DENOISING}.0.{ACTION_MODEL}.net.blocks.0",
    }
    heads = {}
    for part, path in parts.items():
        attention = [n for n in nodes_under(gm.graph, path) if is_call(n, aten.scaled_dot_product_attention.default)]
        if len(attention) != 1:
            raise UnsupportedModelError(
                f"backend evla found no attention under {path!r}: it compiles a CogACT policy as a whole,"
                " policy.compile(backend='evla') or torch.compile(policy, backend='evla')"
            )
        heads[part] = int(argument(attention[0], 0).meta["val"].shape[1])
    for tower in ("dino", "siglip"):  # a checkpoint has the last block and norm too, which no policy reads
        prefix = f"vision_backbone.{tower}_featurizer."
        blocks = {name.split(".")[3] for name in shapes if name.startswith(f"{prefix}blocks.")}
        shapes |= {f"{prefix}norm.weight": (), f"{prefix}blocks.{len(blocks)}.norm1.weight": ()}
    return infer_sizes(shapes, heads)
