"""`RepairLayers` against a policy whose projections were replaced by hand."""

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
from evla_compile.passes import PruneLayers, PruneMLP, RepairLayers
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
TIME = torch.tensor([30.0])
LAYERS = (1, 3)


def refit(layers: tuple[int, ...] = LAYERS, neurons: int = 48, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)
    shapes = {
        "self_attn.o_proj.weight": (32, 32),
        "mlp.down_proj.weight": (32, neurons),
        "mlp.down_proj.bias": (32,),
    }
    return {
        f"{COGACT.decoder_layers}.{layer}.{name}": (0.1 * torch.randn(shape, generator=generator)).to(dtype)
        for layer in layers
        for name, shape in shapes.items()
    }


def with_weights(policy: CogACT, tensors: dict[str, Tensor]) -> CogACT:
    """Return the policy with new output and down projections, the latter with a bias."""
    changed = deepcopy(policy)
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        projection = changed.get_submodule(path)
        assert isinstance(projection, nn.Linear)
        setattr(projection, kind, nn.Parameter(tensor, requires_grad=False))
    return changed


def test_it_equals_the_policy_with_the_weights_and_has_its_operators(
    small_policy: CogACT, small_graph: fx.GraphModule, small_config: CompileConfig, small_inputs: Inputs
) -> None:
    oracle, inputs = with_weights(small_policy, refit()), (*small_inputs, TIME)
    repaired, report = RepairLayers(layers=LAYERS, tensors=refit())(small_graph)
    assert torch.equal(repaired(*inputs), NoisePrediction(oracle)(*inputs, cfg_scale=1.5))
    assert not torch.equal(repaired(*inputs), small_graph(*inputs))
    assert (report.changes, report.exact) == (2, False)
    assert report.after == measure(repaired) == measure(capture(oracle, small_config))
    assert report.after.weight_bytes == report.before.weight_bytes + 2 * 32 * 4  # a bias each


def test_the_neurons_and_layers_that_stay_are_repaired(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs
) -> None:
    kept = tuple(range(0, 48, 2))
    pruned, _ = PruneLayers(keep=(0, 1, 3))(small_graph)
    narrow, _ = PruneMLP(neurons=((1, kept), (3, kept)))(pruned)
    repaired, _ = RepairLayers(layers=LAYERS, tensors=refit(neurons=24))(narrow)
    oracle, inputs = deepcopy(small_policy), (*small_inputs, TIME)
    for layer in LAYERS:
        mlp = oracle.get_submodule(f"{COGACT.decoder_layers}.{layer}.mlp")
        for name in ("gate_proj", "up_proj"):
            projection = mlp.get_submodule(name)
            assert isinstance(projection, nn.Linear)
            projection.weight = nn.Parameter(projection.weight[list(kept)], requires_grad=False)
    oracle = with_weights(oracle, refit(neurons=24))
    del oracle.llm_backbone.llm.model.layers[2]
    assert torch.equal(repaired(*inputs), NoisePrediction(oracle)(*inputs, cfg_scale=1.5))


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        RepairLayers(layers=LAYERS, tensors=refit())(small_graph)


def test_repairing_no_layer_changes_nothing(small_graph: fx.GraphModule) -> None:
    same, report = RepairLayers(layers=(), tensors={})(small_graph)
    assert report.changes == 0
    assert str(same.graph) == str(small_graph.graph)
    assert all(tensor is dict(weights(small_graph))[name] for name, tensor in weights(same))


def test_a_layer_that_the_graph_does_not_have_is_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"no decoder layers \[7\] in the graph to repair; it has \[0, 1, 2, 3\]"):
        RepairLayers(layers=(1, 7), tensors=refit((1, 7)))(small_graph)


def test_a_layer_without_tensors_is_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"no refit .*layers\.2\.self_attn\.o_proj\.weight: the tensors of the plan"):
        RepairLayers(layers=(1, 2), tensors=refit((1,)))(small_graph)


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        (refit(neurons=24), r"torch\.float32\[32, 24\], the graph needs torch\.float32\[32, 48\]"),
        (refit(dtype=torch.bfloat16), r"torch\.bfloat16\[32, 32\], the graph needs torch\.float32\[32, 32\]"),
    ],
)
def test_tensors_of_another_shape_or_dtype_are_refused(
    small_graph: fx.GraphModule, tensors: dict[str, Tensor], found: str
) -> None:
    with pytest.raises(PassError, match=found):
        RepairLayers(layers=LAYERS, tensors=tensors)(small_graph)


def test_a_second_repair_is_refused(small_graph: fx.GraphModule) -> None:
    repaired, _ = RepairLayers(layers=LAYERS, tensors=refit())(small_graph)
    with pytest.raises(PassError, match="decoder layer 1: its down projection has a bias already: repair it once"):
        RepairLayers(layers=LAYERS, tensors=refit())(repaired)


def test_a_weight_with_a_second_reader_is_refused(small_graph: fx.GraphModule) -> None:
    shared = copy_graph(small_graph)
    first, second = (layer.named("mlp.down_proj") for layer in decoder_layers(shared.graph)[1:3])
    second.args = (second.args[0], first.args[1])
    with pytest.raises(PassError, match=r"decoder layer 1: .* is read elsewhere too, so it cannot be refit"):
        RepairLayers(layers=(1,), tensors=refit((1,)))(shared)


def test_its_name_gives_the_layers_rather_than_every_tensor() -> None:
    assert repr(RepairLayers(layers=LAYERS, tensors=refit())) == "RepairLayers(layers=(1, 3))"
