"""`FoldConstants`: the same numbers, from a graph in which every operator depends on an input."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, fx

from evla_compile.families.cogact.model.language import rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import weights
from evla_compile.graph.sites import is_call, nodes_under
from evla_compile.passes import FoldConstants, NarrowLastLayer, SelectTokens, SpecializeShapes
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.schedule import ddim_timesteps

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
NET = f"{COGACT.action_model}.net"


@pytest.fixture(scope="module")
def static(small_sampler: fx.GraphModule) -> fx.GraphModule:
    return SpecializeShapes(text_tokens=9)(small_sampler)[0]


@pytest.fixture(scope="module")
def reduced(small_sampler: fx.GraphModule) -> fx.GraphModule:
    """With a selection and a narrowed last layer, whose masks and positions can be folded as well."""
    selected, _ = SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)(small_sampler)
    return SpecializeShapes(text_tokens=9)(NarrowLastLayer()(selected)[0])[0]


@pytest.mark.parametrize("name", ["static", "reduced"])
def test_the_same_numbers_come_from_operators_on_inputs_alone(
    name: str, small_inputs: Inputs, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(name)
    folded, report = FoldConstants()(graph)
    assert torch.equal(folded(*small_inputs), graph(*small_inputs))
    live = set(folded.graph.find_nodes(op="placeholder"))
    for node in folded.graph.nodes:
        if node.op == "call_function":
            assert live.intersection(node.all_input_nodes), node.format_node()
            live.add(node)
    assert report.exact
    assert report.changes == report.before.ops - report.after.ops > 0


def test_timestep_embeddings_the_unconditional_branch_and_rotary_tables_are_constants(
    static: fx.GraphModule, small_policy: CogACT
) -> None:
    folded, _ = FoldConstants()(static)
    tensors = [tensor for _, tensor in weights(folded)]
    net = small_policy.action_model.net
    unconditional = net.z_embedder(net.z_embedder.uncondition[None])
    expected = [table[:, None] for table in rotary_tables(torch.zeros(1, 16 + 9, 32), 8)]
    for timestep in ddim_timesteps(5):
        time = net.t_embedder(torch.tensor([float(timestep)]))[:, None]
        expected += [time, (unconditional + time).expand(2, -1, -1)]
    for table in expected:
        assert any(torch.equal(table, tensor) for tensor in tensors)
    assert not [n for n in folded.graph.nodes if is_call(n, aten.cos.default, aten.sin.default)]
    for step in range(5):
        assert not nodes_under(folded.graph, f"{COGACT.denoising}.{step}.{NET}.t_embedder")
    (embedding,) = nodes_under(folded.graph, f"{NET}.z_embedder")
    assert is_call(embedding, aten.linear.default)  # of the cognition feature


def test_weights_that_only_constants_needed_are_gone(static: fx.GraphModule, small_policy: CogACT) -> None:
    folded, report = FoldConstants()(static)
    parameters = {name: parameter.numel() for name, parameter in small_policy.named_parameters()}
    gone = set(parameters) - {name for name, _ in weights(folded)}
    dino = "vision_backbone.dino_featurizer"
    assert gone == {
        *(name for name in parameters if ".t_embedder." in name),
        f"{NET}.z_embedder.uncondition",
        f"{NET}.positional_embedding",
        f"{dino}.cls_token",
        f"{dino}.reg_token",
    }
    batch, steps = 2, 5
    added = {
        "prefix tokens of each row": batch * 3 * 16,
        "rotary tables, shared by all layers": 2 * (16 + 9) * 8,
        "timestep embeddings": steps * 20,
        "unconditional tokens of each row": steps * batch * 20,
        "positional embeddings": (1 + 5) * 20,
    }
    timesteps = steps
    change = sum(added.values()) - sum(parameters[name] for name in gone) - timesteps
    assert report.after.weight_bytes - report.before.weight_bytes == 4 * change


def test_a_folded_slice_does_not_keep_what_it_was_cut_from(static: fx.GraphModule) -> None:
    folded, _ = FoldConstants()(static)
    constants = [tensor for name, tensor in weights(folded) if name.startswith("held_")]
    assert constants
    assert all(tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size() for tensor in constants)


def test_a_symbolic_length_keeps_what_depends_on_it(small_sampler: fx.GraphModule, small_inputs: Inputs) -> None:
    folded, _ = FoldConstants()(small_sampler)
    assert any(is_call(n, aten.cos.default) for n in folded.graph.nodes)
    assert (
        len([n for n in nodes_under(folded.graph, COGACT.decoder_layers) if is_call(n, aten.linear.default)]) == 4 * 7
    )
    image, _, text_length, noise = small_inputs
    longer = torch.randint(1, 64, (2, 14), generator=torch.Generator().manual_seed(1))
    inputs = image, longer, text_length, noise
    assert torch.equal(folded(*inputs), small_sampler(*inputs))


def test_the_input_graph_is_untouched(
    static: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(static):
        FoldConstants()(static)


def test_folding_twice_changes_nothing(static: fx.GraphModule) -> None:
    once, _ = FoldConstants()(static)
    twice, report = FoldConstants()(once)
    assert report.changes == 0
    assert str(twice.graph) == str(once.graph)
