"""A finished graph as an `ExportedProgram`, the form that every exporter starts from."""

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from evla_compile.graph.contract import weights


def to_exported_program(gm: fx.GraphModule) -> ExportedProgram:
    """Return `gm` as an `ExportedProgram` that shares its tensors: every tensor becomes an input of the graph.

    `torch.export.export` would trace `gm` again, which takes its time and loses the module that each node came from.
    """
    graph, state = fx.Graph(), {}
    values: dict[fx.Node, fx.Node] = {}
    inputs: list[InputSpec] = []
    for number, (name, tensor) in enumerate(weights(gm)):
        lifted = graph.placeholder(f"b_{number}")
        sources = list(gm.graph.find_nodes(op="get_attr", target=name))
        lifted.meta = dict(sources[0].meta)
        values.update(dict.fromkeys(sources, lifted))
        state[name] = tensor
        inputs.append(InputSpec(InputKind.BUFFER, TensorArgument(lifted.name), name, persistent=True))
    for node in gm.graph.nodes:
        if node.op not in ("get_attr", "output"):
            values[node] = graph.node_copy(node, values.__getitem__)
    users = [values[node] for node in gm.graph.find_nodes(op="placeholder")]
    results = [values[node] for node in gm.graph.output_node().all_input_nodes]
    inputs += [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in users]
    graph.output(tuple(results))
    outputs = [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in results]
    in_spec = pytree.tree_flatten((tuple(range(len(users))), {}))[1]
    out_spec = pytree.tree_flatten(tuple(range(len(results))))[1]
    call = ModuleCallSignature([], [], in_spec, out_spec, [str(node.target) for node in users])
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints={},
        module_call_graph=[ModuleCallEntry("", call)],
    )
