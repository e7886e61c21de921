"""Policy to graph: the same numbers at any text length, nothing but the arithmetic, every module found again."""

import operator
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.capture import TIMESTEP
from evla_compile.graph.contract import weights
from evla_compile.graph.sites import decoder_layers, indexed_modules, is_call, nodes_under, stage_node
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
TIME = torch.tensor([30.0])


@pytest.mark.parametrize("text_tokens", [6, 9, 20])
def test_the_graph_equals_the_policy_at_every_text_length(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, text_tokens: int
) -> None:
    image, _, _, noise = small_inputs
    input_ids = torch.randint(1, 64, (2, text_tokens), generator=torch.Generator().manual_seed(text_tokens))
    inputs = image, input_ids, torch.tensor([4, text_tokens]), noise, TIME
    assert torch.equal(small_graph(*inputs), NoisePrediction(small_policy)(*inputs, cfg_scale=1.5))


def test_without_guidance_only_the_conditional_half_is_captured(
    small_policy: CogACT,
    small_graph: fx.GraphModule,
    small_unguided_graph: fx.GraphModule,
    small_inputs: Inputs,
) -> None:
    inputs = *small_inputs, TIME
    assert torch.equal(small_unguided_graph(*inputs), NoisePrediction(small_policy)(*inputs, cfg_scale=1.0))
    assert [_action_tokens(graph).meta["val"].shape[0] for graph in (small_graph, small_unguided_graph)] == [4, 2]


def _action_tokens(gm: fx.GraphModule) -> fx.Node:
    return next(
        n for n in nodes_under(gm.graph, f"{COGACT.action_model}.net.blocks.0") if is_call(n, aten.layer_norm.default)
    )


def test_inputs_are_named_and_typed_as_documented(small_graph: fx.GraphModule) -> None:
    inputs = {n.target: n.meta["val"] for n in small_graph.graph.find_nodes(op="placeholder")}
    assert tuple(inputs) == (*COGACT.input_names, TIMESTEP)
    assert [value.dtype for value in inputs.values()] == [
        torch.uint8,
        torch.int64,
        torch.int64,
        torch.float32,
        torch.float32,
    ]
    assert [value.ndim for value in inputs.values()] == [4, 2, 1, 3, 1]


def test_the_text_length_is_the_only_symbol_and_is_read_once(small_graph: fx.GraphModule) -> None:
    reads = [n for n in small_graph.graph.nodes if is_call(n, aten.sym_size.int)]
    assert [(n.args[0].target, n.args[1]) for n in reads] == [("input_ids", 1)]
    lengths = {layer.length for layer in decoder_layers(small_graph.graph)}
    assert len(lengths) == 1
    assert lengths.pop().all_input_nodes == reads


def test_a_text_budget_that_equals_another_size_stays_symbolic(small_policy: CogACT, small_inputs: Inputs) -> None:
    graph = capture(small_policy, CompileConfig.dense(text_tokens=16, batch_size=2))  # 16 patches
    inputs = *small_inputs, TIME
    assert torch.equal(graph(*inputs), NoisePrediction(small_policy)(*inputs, cfg_scale=1.5))


def test_nothing_but_arithmetic_is_left(small_graph: fx.GraphModule) -> None:
    calls = [n for n in small_graph.graph.nodes if n.op == "call_function"]
    scalar = (operator.getitem, operator.add, operator.sub)
    assert all(n.target in scalar or isinstance(n.target, torch._ops.OpOverload) for n in calls)
    leftovers = {"_assert_tensor_metadata", "alias", "detach", "detach_", "lift_fresh_copy", "_to_copy", "dropout"}
    assert not leftovers & {n.target.overloadpacket.__name__ for n in calls if n.target not in scalar}
    casts = [n for n in calls if is_call(n, aten.to.dtype)]
    assert casts
    assert all(n.meta["val"].dtype != n.args[0].meta["val"].dtype for n in casts)
    assert all(n.users for n in calls)


def test_the_graph_shares_every_weight_with_the_policy(small_policy: CogACT, small_graph: fx.GraphModule) -> None:
    tensors = dict(weights(small_graph))
    parameters = dict(small_policy.named_parameters())
    assert {name: tensors[name].data_ptr() for name in parameters} == {n: p.data_ptr() for n, p in parameters.items()}
    constants = [tensor for name, tensor in tensors.items() if name not in parameters]
    assert sum(tensor.numel() for tensor in constants) == 4 * 3  # mean and deviation of both towers' pixels


def test_stages_hold_the_values_of_the_policys_modules(
    small_policy: CogACT,
    small_graph: fx.GraphModule,
    small_inputs: Inputs,
    node_values: Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]],
) -> None:
    image, input_ids, text_length, _ = small_inputs
    values = node_values(small_graph, (*small_inputs, TIME))
    patches = small_policy.vision_backbone(image)
    assert torch.equal(values[stage_node(small_graph.graph, "patches")], patches)
    assert torch.equal(values[stage_node(small_graph.graph, "projected")], small_policy.projector(patches))
    cognition = small_policy.cognition(image, input_ids, text_length)
    assert torch.equal(values[stage_node(small_graph.graph, "cognition")], cognition)


def test_every_decoder_layer_and_block_is_found_by_its_path(small_graph: fx.GraphModule) -> None:
    graph = small_graph.graph
    layers = decoder_layers(graph)
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert all(following.entry is layer.exit for layer, following in pairwise(layers))
    assert {n.name for layer in layers for n in layer.nodes} == {
        n.name for n in nodes_under(graph, COGACT.decoder_layers)
    }
    assert list(indexed_modules(graph, f"{COGACT.action_model}.net.blocks")) == [0, 1]


def test_a_bfloat16_policy_is_captured_as_it_runs(
    small_bfloat16_policy: CogACT, small_bfloat16_graph: fx.GraphModule, small_inputs: Inputs
) -> None:
    inputs = *small_inputs, TIME
    assert torch.equal(small_bfloat16_graph(*inputs), NoisePrediction(small_bfloat16_policy)(*inputs, cfg_scale=1.5))
    angles = [n for n in small_bfloat16_graph.graph.nodes if is_call(n, aten.cos.default, aten.sin.default)]
    assert angles
    assert all(n.meta["val"].dtype == torch.float32 for n in angles)


def test_captured_inputs_have_the_shapes_of_the_policy_and_settings(
    small_graph: fx.GraphModule, small_inputs: Inputs
) -> None:
    *found, timestep = [node.meta["val"] for node in small_graph.graph.find_nodes(op="placeholder")]
    forms = [(tuple(map(int, value.shape)), value.dtype) for value in found]
    assert forms == [(tuple(given.shape), given.dtype) for given in small_inputs]
    assert timestep.shape == (1,)
