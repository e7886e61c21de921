"""Capture a policy as an FX graph of ATen operators by `torch.export`: one denoising step, symbolic text length.

The captured graph predicts the noise of one step from `image`, `input_ids`, `text_length`, `noise` and `timestep`;
`UnrollDiffusion` turns it into the sampler. The text length stays one symbolic size, so a rewrite that shortens the
sequence changes one node instead of five literals in every layer. `capture_upstream` captures what the public code runs
instead, the baseline of every figure.
"""

from copy import deepcopy

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.capture import _flat_graph, aten
from evla_compile.graph.contract import copy_graph, fake_mode, propagate, replace_tensor
from evla_compile.graph.inputs import to_tensors
from evla_compile.graph.sites import decoder_layers, input_node, is_call, module_path, nodes_under
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.inputs import GraphInputs, InputSignature
from evla_compile.settings.anatomy import COGACT, COGNITION, INPUT_IDS, LAYERS, PATCHES, PROJECTED, TEXT_LENGTH
from evla_compile.settings.config import CompileConfig


@own_torch_state()
def capture(policy: CogACT, config: CompileConfig) -> fx.GraphModule:
    """Return the graph of one noise prediction of `policy`, its weights shared with the policy.

    Inputs: `image` uint8 [B,S,S,3], `input_ids` int64 [B,T] with T symbolic, `text_length` int64 [B], `noise`
    float32 [B,A,F], `timestep` float32 [1]; output: predicted noise float32 [B,A,F]. Of `config` only batch size, text
    budget (the symbolic size's value for FLOP counts) and guidance scale are used.
    """
    example = (*_examples(policy, config), torch.zeros(1, device=next(policy.parameters()).device))
    text = Dim("text", min=4, max=2048)
    dynamic: tuple[dict[int, Dim] | None, ...] = ({}, {1: text}, {}, {}, {}, None)
    policy_without_weights = _without_weights(policy)
    with torch.no_grad():  # otherwise the rotary tables come out wrapped in a set_grad_enabled operator
        exported = torch.export.export(
            NoisePrediction(policy_without_weights), (*example, config.cfg_scale), dynamic_shapes=dynamic, strict=False
        )
    gm = _flat_graph(exported)
    mark_stages(gm)
    state = policy.state_dict()
    for name in sorted({str(node.target) for node in gm.graph.find_nodes(op="get_attr")} & state.keys()):
        replace_tensor(gm, name, state[name])
    propagate(gm)
    return copy_graph(gm)


@own_torch_state()
def capture_upstream(policy: UpstreamCogACT, config: CompileConfig) -> fx.GraphModule:
    """Return the graph of everything that upstream runs for one action chunk, its weights shared with `policy`.

    Inputs: those of a finished graph, `image` uint8 [B,S,S,3], `input_ids` int64 [B,T] with T symbolic and without
    padding, `text_length` int64 [B], which upstream does not know and only a selection of visual tokens reads, and
    `noise` float32 [B,A,F]. Outputs: those of `UpstreamCogACT`. The sampler is unrolled, as `UnrollDiffusion` leaves
    it, so the rewrites of the decoder and of the denoising steps apply. Operators keep the weights' own dtypes, without
    autocast. Of `config` only batch size, text budget, denoising steps and guidance scale are used.
    """
    image, input_ids, text_length, noise = _examples(policy, config)
    settings = {"ddim_steps": config.ddim_steps, "cfg_scale": config.cfg_scale}
    dynamic = {"image": {}, "input_ids": {1: Dim("text", min=4, max=2048)}, "noise": {}, **dict.fromkeys(settings)}
    with torch.no_grad():
        exported = torch.export.export(
            policy, (image, input_ids, noise), settings, dynamic_shapes=dynamic, strict=False
        )
    gm = _flat_graph(exported)
    with gm.graph.inserting_after(input_node(gm.graph, INPUT_IDS)), fake_mode(gm):
        gm.graph.placeholder(TEXT_LENGTH).meta["val"] = torch.empty_like(text_length)
    _name_steps(gm.graph)
    return copy_graph(gm)


def _examples(policy: CogACT | UpstreamCogACT, config: CompileConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return inputs of the shapes that a capture records, on the policy's device."""
    signature = InputSignature.of(policy.sizes, batch_size=config.batch_size, text_tokens=config.text_tokens)
    return to_tensors(GraphInputs.blank(signature), next(policy.parameters()).device)


def _without_weights(policy: CogACT) -> CogACT:
    """Return a copy of `policy` whose weights are fake tensors, so that export neither reads nor copies a weight."""
    replacements: dict[int, object] = {id(policy.processor): policy.processor}
    with FakeTensorMode(shape_env=ShapeEnv()):
        for tensor in policy.parameters():
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
            replacements[id(tensor)] = nn.Parameter(fake, requires_grad=False)
    return deepcopy(policy, replacements)


def _name_steps(graph: fx.Graph) -> None:
    """Move the action model's calls, and the sampler's arithmetic behind each, under the paths of denoising steps."""
    step = None
    for node in graph.nodes:
        path = module_path(node)
        if path == COGACT.action_model or path.startswith(f"{COGACT.action_model}."):
            call = next(reversed(node.meta["nn_module_stack"]))  # export numbers repeated calls: "…action_model.net@3"
            step = f"{COGACT.denoising}.{call.partition('@')[2] or 0}"
            path = f"{step}.{path}"
        elif node.op == "call_function" and step is not None:
            path = step
        else:
            continue
        node.meta["nn_module_stack"] = {path: (path, path)}


def mark_stages(gm: fx.GraphModule) -> None:
    """Name the values of a captured policy that verification compares."""
    nodes_under(gm.graph, COGACT.vision)[-1].meta["stage"] = PATCHES
    nodes_under(gm.graph, COGACT.projector)[-1].meta["stage"] = PROJECTED
    for layer in decoder_layers(gm.graph):
        layer.exit.meta["stage"] = f"{LAYERS}.{layer.index}"
    (readout,) = [n for n in gm.graph.nodes if is_call(n, aten.gather.default) and module_path(n) == ""]
    readout.meta["stage"] = COGNITION
