"""`PruneLayers` against a policy whose layers were taken out by hand."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy

import pytest
import torch
from torch import Tensor, fx, nn

from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.contract import measure, weights
from evla_compile.graph.sites import decoder_layers, is_call, nodes_under
from evla_compile.passes import PruneLayers
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
TIME = torch.tensor([30.0])


def with_layers(policy: CogACT, kept: tuple[int, ...]) -> CogACT:
    cut = deepcopy(policy)
    decoder = cut.llm_backbone.llm.model
    decoder.layers = nn.ModuleList(decoder.layers[i] for i in kept)
    return cut


@pytest.mark.parametrize("kept", [(0, 2), (1, 2, 3), (0, 1, 3), (3,)])
def test_it_equals_the_policy_without_the_layers(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, kept: tuple[int, ...]
) -> None:
    pruned, report = PruneLayers(keep=kept)(small_graph)
    inputs = *small_inputs, TIME
    assert torch.equal(pruned(*inputs), NoisePrediction(with_layers(small_policy, kept))(*inputs, cfg_scale=1.5))
    assert (report.changes, report.exact) == (4 - len(kept), False)


def test_it_has_the_operators_and_weights_of_the_policy_without_the_layers(
    small_policy: CogACT, small_graph: fx.GraphModule, small_config: CompileConfig
) -> None:
    pruned, report = PruneLayers(keep=(0, 2))(small_graph)
    assert report.after == measure(pruned) == measure(capture(with_layers(small_policy, (0, 2)), small_config))


def test_the_weights_of_deleted_layers_are_gone(small_policy: CogACT, small_graph: fx.GraphModule) -> None:
    pruned, report = PruneLayers(keep=(0, 3))(small_graph)
    layers = small_policy.llm_backbone.llm.model.layers
    deleted = sum(4 * parameter.numel() for i in (1, 2) for parameter in layers[i].parameters())
    assert report.before.weight_bytes - report.after.weight_bytes == deleted
    indices = {name.split(".")[4] for name, _ in weights(pruned) if name.startswith(COGACT.decoder_layers)}
    assert (
        indices
        == {name.split(".")[4] for name in pruned.state_dict() if name.startswith(COGACT.decoder_layers)}
        == {"0", "3"}
    )


def test_the_attention_of_deleted_layers_is_gone(small_graph: fx.GraphModule) -> None:
    pruned, _ = PruneLayers(keep=(0, 2))(small_graph)
    attention = [
        n
        for n in nodes_under(pruned.graph, COGACT.decoder_layers)
        if is_call(n, aten.scaled_dot_product_attention.default)
    ]
    assert len(attention) == 2


def test_layers_that_stay_keep_their_indices(small_graph: fx.GraphModule) -> None:
    once, _ = PruneLayers(keep=(0, 2, 3))(small_graph)
    twice, report = PruneLayers(keep=(0, 3))(once)
    assert [layer.index for layer in decoder_layers(twice.graph)] == [0, 3]
    assert report.after == PruneLayers(keep=(0, 3))(small_graph)[1].after


def test_the_order_of_the_indices_does_not_matter(small_graph: fx.GraphModule) -> None:
    assert str(PruneLayers(keep=(3, 1))(small_graph)[0].graph) == str(PruneLayers(keep=(1, 3))(small_graph)[0].graph)


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        PruneLayers(keep=(1,))(small_graph)


def test_keeping_every_layer_changes_nothing(small_graph: fx.GraphModule) -> None:
    same, report = PruneLayers(keep=(0, 1, 2, 3))(small_graph)
    assert report.changes == 0
    assert str(same.graph) == str(small_graph.graph)


@pytest.mark.parametrize("keep", [(), (0, 4), (-1, 0)])
def test_layers_that_the_graph_does_not_have_are_refused(small_graph: fx.GraphModule, keep: tuple[int, ...]) -> None:
    with pytest.raises(PassError, match=r"keep=\(.*\): expected at least one of .* decoder layers \[0, 1, 2, 3\]"):
        PruneLayers(keep=keep)(small_graph)


def test_a_graph_without_decoder_layers_is_refused() -> None:
    with pytest.raises(PassError, match=r"no decoder layer under .*: expected the captured graph"):
        PruneLayers(keep=(0,))(fx.symbolic_trace(nn.Identity()))
