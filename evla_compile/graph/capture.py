"""Turn what torch.export returns into a flat graph of ATen operators; nothing here knows a policy."""

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram

from evla_compile.graph.contract import copy_graph, propagate, remove_dead_nodes
from evla_compile.graph.sites import argument, is_call, module_path
from evla_compile.graph.torch_state import own_torch_state

aten = torch.ops.aten


_NO_MODULE = "_empty_nn_module_stack_from_metadata_hook"
"""What torch.export calls the module of a node that belongs to none."""


TIMESTEP = "timestep"
"""Name of the captured graph's input that `UnrollDiffusion` replaces by constants."""


@own_torch_state()
def capture_decoder(model: nn.Module, example_ids: torch.Tensor) -> fx.GraphModule:
    """Return the graph of any language model whose Llama layers have the module path `COGACT.decoder_layers`.

    Use it to try the rewrites of the decoder on other language models; `CogACT` is captured by `capture`.

    Args:
        model: takes ids int64 [B,T] as `input_ids` and returns one tensor.
        example_ids: ids of any content, whose batch stays fixed and whose length is symbolic in the graph.
    """
    with torch.no_grad():
        exported = torch.export.export(
            model, (example_ids,), dynamic_shapes=({1: Dim("text", min=4, max=2048)},), strict=False
        )
    gm = _flat_graph(exported)
    propagate(gm)
    return copy_graph(gm)


def _flat_graph(exported: ExportedProgram) -> fx.GraphModule:
    gm = exported.module(check_guards=False)
    if not isinstance(gm, fx.GraphModule):
        raise TypeError(f"torch.export returned a {type(gm).__name__}, expected a GraphModule")
    clean(gm)
    return gm


def clean(gm: fx.GraphModule) -> None:
    """Remove what export adds around the arithmetic: metadata assertions, no-op casts, copies of constants."""
    for node in list(gm.graph.nodes):
        if is_call(node, aten._assert_tensor_metadata.default):
            gm.graph.erase_node(node)
        elif _is_noop(node):
            node.replace_all_uses_with(argument(node, 0))
            gm.graph.erase_node(node)
        elif node.op == "placeholder" and not isinstance(node.meta["val"], torch.Tensor):
            gm.graph.erase_node(node)  # the guidance scale, which is a literal wherever it is used
    output = gm.graph.output_node()
    results = output.all_input_nodes
    output.args = (results[0] if len(results) == 1 else tuple(results),)
    gm.graph.set_codegen(fx.graph.CodeGen())  # plain positional arguments and result instead of pytrees
    remove_dead_nodes(gm.graph)
    for node in gm.graph.nodes:  # keep what passes read; the rest contains stack traces with local paths
        node.meta = {key: node.meta[key] for key in ("val", "nn_module_stack") if key in node.meta}
        if module_path(node) == _NO_MODULE:
            del node.meta["nn_module_stack"]


def _is_noop(node: fx.Node) -> bool:
    if is_call(node, aten.alias.default, aten.lift_fresh_copy.default, aten.detach_.default, aten.detach.default):
        return True
    return is_call(node, aten.to.dtype) and node.meta["val"].dtype == argument(node, 0).meta["val"].dtype
