"""`PruneMLP` against a policy whose projections were sliced by hand."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy

import pytest
import torch
from torch import Tensor, fx, nn

from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.contract import copy_graph, measure, weights
from evla_compile.graph.sites import decoder_layers
from evla_compile.passes import PruneLayers, PruneMLP
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
TIME = torch.tensor([30.0])
ALL = tuple(range(48))
NEURONS = ((0, tuple(range(0, 48, 2))), (1, tuple(range(16))), (3, (0, 5, 6, 47)))


def with_neurons(policy: CogACT) -> CogACT:
    cut = deepcopy(policy)
    for layer, kept in NEURONS:
        mlp = cut.llm_backbone.llm.model.layers[layer].mlp
        assert isinstance(mlp, nn.Module)
        for projection, dim in ((mlp.gate_proj, 0), (mlp.up_proj, 0), (mlp.down_proj, 1)):
            assert isinstance(projection, nn.Linear)
            chosen = torch.stack([projection.weight.select(dim, n) for n in kept], dim)
            projection.weight = nn.Parameter(chosen, requires_grad=False)
    return cut


def test_it_equals_the_sliced_policy_and_has_its_operators_and_weights(
    small_policy: CogACT, small_graph: fx.GraphModule, small_config: CompileConfig, small_inputs: Inputs
) -> None:
    oracle, inputs = with_neurons(small_policy), (*small_inputs, TIME)
    pruned, report = PruneMLP(neurons=NEURONS)(small_graph)
    assert torch.equal(pruned(*inputs), NoisePrediction(oracle)(*inputs, cfg_scale=1.5))
    assert (report.changes, report.exact) == (3, False)
    assert report.after == measure(pruned) == measure(capture(oracle, small_config))


def test_the_sliced_weights_alone_are_held(small_graph: fx.GraphModule) -> None:
    pruned, report = PruneMLP(neurons=NEURONS)(small_graph)
    assert report.before.weight_bytes - report.after.weight_bytes == 4 * 3 * 32 * ((48 - 24) + (48 - 16) + (48 - 4))
    for name, tensor in weights(pruned):
        assert tensor.untyped_storage().nbytes() == tensor.numel() * 4 or "mlp" not in name


def test_it_composes_with_pruned_layers(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs
) -> None:
    pruned, _ = PruneMLP(neurons=NEURONS)(PruneLayers(keep=(0, 1, 3))(small_graph)[0])
    oracle, inputs = with_neurons(small_policy), (*small_inputs, TIME)
    del oracle.llm_backbone.llm.model.layers[2]
    assert torch.equal(pruned(*inputs), NoisePrediction(oracle)(*inputs, cfg_scale=1.5))


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        PruneMLP(neurons=NEURONS)(small_graph)


def test_keeping_every_neuron_changes_nothing(small_graph: fx.GraphModule) -> None:
    same, report = PruneMLP(neurons=((0, ALL), (2, ALL)))(small_graph)
    assert report.changes == 0
    assert str(same.graph) == str(small_graph.graph)
    assert all(tensor is dict(weights(small_graph))[name] for name, tensor in weights(same))


def test_its_name_gives_the_widths_rather_than_every_neuron() -> None:
    assert repr(PruneMLP(neurons=NEURONS)) == "PruneMLP(layers=3, neurons=[4, 16, 24])"
    assert repr(PruneMLP(neurons=((0, (1, 2)), (1, (3, 4))))) == "PruneMLP(layers=2, neurons=2)"


def test_a_layer_that_the_graph_does_not_have_is_refused(small_graph: fx.GraphModule) -> None:
    pruned, _ = PruneLayers(keep=(0, 1, 3))(small_graph)
    with pytest.raises(PassError, match=r"no decoder layers \[2, 7\] in the graph; it has \[0, 1, 3\]"):
        PruneMLP(neurons=((0, ALL), (2, ALL), (7, ALL)))(pruned)


@pytest.mark.parametrize("kept", [(), (3, 1), (1, 1), (-1, 4), (0, 48)])
def test_neurons_that_do_not_ascend_within_the_layer_are_refused(
    small_graph: fx.GraphModule, kept: tuple[int, ...]
) -> None:
    with pytest.raises(PassError, match=r"decoder layer 2: neurons must ascend within 0\.\.47, at least one"):
        PruneMLP(neurons=((0, (0, 1)), (2, kept)))(small_graph)


def test_a_weight_with_a_second_reader_is_refused(small_graph: fx.GraphModule) -> None:
    shared = copy_graph(small_graph)
    first, second = (layer.named("mlp.up_proj") for layer in decoder_layers(shared.graph)[:2])
    second.args = (second.args[0], first.args[1])
    with pytest.raises(PassError, match=r"decoder layer 1: the weight of mlp.up_proj is not a tensor of its own"):
        PruneMLP(neurons=((1, (0, 1)),))(shared)


def test_a_layer_without_a_gated_mlp_is_refused(small_graph: fx.GraphModule) -> None:
    plain = copy_graph(small_graph)
    gate = decoder_layers(plain.graph)[0].named("mlp.gate_proj")
    gate.meta["nn_module_stack"] = {"mlp": (f"{COGACT.decoder_layers}.0.mlp", "")}
    with pytest.raises(PassError, match=r"decoder layer 0: expected one linear node in mlp.gate_proj, found 0"):
        PruneMLP(neurons=((0, (0, 1)),))(plain)
