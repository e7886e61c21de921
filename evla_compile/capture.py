"""Policy to FX graph: `torch.export` at ATen level, sequence length symbolic, one denoising step.

The captured graph predicts the noise of one step from `image`, `input_ids`, `text_length`, `noise` and `timestep`;
`UnrollDiffusion` makes the sampler of it. The text length stays one symbolic size, so a rewrite that shortens the
sequence changes one node instead of five literals in every layer.
"""

import torch
from torch import fx
from torch.export import Dim

from evla_compile.config import CompileConfig
from evla_compile.graph import copy_graph, remove_dead_nodes
from evla_compile.model.policy import CogACT
from evla_compile.sites import argument, is_call, module_path, nodes_under

aten = torch.ops.aten

TIMESTEP = "timestep"
"""Name of the captured graph's input that `UnrollDiffusion` replaces by constants."""


def capture(policy: CogACT, config: CompileConfig) -> fx.GraphModule:
    """Return the graph of one noise prediction of `policy`, its weights shared with the policy.

    Inputs: `image` uint8 [B,S,S,3], `input_ids` int64 [B,T] with T symbolic, `text_length` int64 [B], `noise`
    float32 [B,A,F], `timestep` float32 [1]; output: predicted noise float32 [B,A,F]. Of `config` only batch size, text
    budget (the symbolic size's value for FLOP counts) and guidance scale are used.
    """
    example = example_inputs(policy, config)
    text = Dim("text", min=4, max=2048)
    dynamic: tuple[dict[int, Dim] | None, ...] = ({}, {1: text}, {}, {}, {}, None)
    with torch.no_grad():  # otherwise the rotary tables come out wrapped in a set_grad_enabled operator
        exported = torch.export.export(policy, (*example, config.cfg_scale), dynamic_shapes=dynamic, strict=False)
    gm = exported.module(check_guards=False)
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"torch.export returned a {type(gm).__name__}, expected a GraphModule")
    _clean(gm)
    _mark_stages(gm)
    return copy_graph(gm)


def example_inputs(policy: CogACT, config: CompileConfig) -> tuple[torch.Tensor, ...]:
    """Return zero-filled inputs of the shapes that `capture` records, on the policy's device."""
    batch, sizes = config.batch_size, policy.sizes
    device = next(policy.parameters()).device
    side = sizes.image_side
    return (
        torch.zeros(batch, side, side, 3, dtype=torch.uint8, device=device),
        torch.zeros(batch, config.text_tokens, dtype=torch.int64, device=device),
        torch.full((batch,), config.text_tokens, dtype=torch.int64, device=device),
        torch.zeros(batch, sizes.action.chunk, sizes.action.action_width, device=device),
        torch.zeros(1, device=device),
    )


def _clean(gm: fx.GraphModule) -> None:
    """Drop what export adds around the arithmetic: metadata assertions, no-op casts, copies of constants."""
    for node in list(gm.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
        elif _is_noop(node):
            node.replace_all_uses_with(argument(node, 0))
            gm.graph.erase_node(node)
        elif node.op == "placeholder" and not isinstance(node.meta["val"], torch.Tensor):
            gm.graph.erase_node(node)  # the guidance scale, already a literal where it is used
    output = gm.graph.output_node()
    output.args = (output.all_input_nodes[0],)
    gm.graph.set_codegen(fx.graph.CodeGen())  # plain positional arguments and result instead of pytrees
    remove_dead_nodes(gm.graph)
    for node in gm.graph.nodes:  # what passes use stays; the rest holds stack traces with local paths
        node.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}


def _mark_stages(gm: fx.GraphModule) -> None:
    """Name the values that verification compares."""
    nodes_under(gm.graph, "vision_backbone")[-1].meta["stage"] = "patches"
    nodes_under(gm.graph, "projector")[-1].meta["stage"] = "projected"
    (readout,) = [n for n in gm.graph.nodes if is_call(n, aten.gather.default) and module_path(n) == ""]
    readout.meta["stage"] = "cognition"


def _is_noop(node: fx.Node) -> bool:
    if is_call(node, aten.alias.default, aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default):
        return True
    return is_call(node, aten.to.dtype) and node.meta["val"].dtype == argument(node, 0).meta["val"].dtype
