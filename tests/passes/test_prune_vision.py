"""`PruneVision` against a policy whose vision MLPs were sliced and replaced by hand."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.contract import copy_graph, measure, weights
from evla_compile.graph.sites import vision_blocks
from evla_compile.passes import PruneVision
from evla_compile.settings.config import CompileConfig

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
TIME = torch.tensor([30.0])
DINO, SIGLIP = (f"vision_backbone.{tower}_featurizer.blocks.0" for tower in ("dino", "siglip"))
NEURONS = {DINO: (0, 3, 4, 27), SIGLIP: tuple(range(0, 26, 2))}
FC2 = f"{SIGLIP}.mlp.fc2"


def refit(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    shapes = {f"{FC2}.weight": (12, 13), f"{FC2}.bias": (12,)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def with_neurons(policy: CogACT, tensors: dict[str, Tensor]) -> CogACT:
    cut = deepcopy(policy)
    for path, kept in NEURONS.items():
        mlp: Any = cut.get_submodule(f"{path}.mlp")
        for layer, parts in ((mlp.fc1, (("weight", 0), ("bias", 0))), (mlp.fc2, (("weight", 1),))):
            for name, dim in parts:
                chosen = torch.stack([getattr(layer, name).select(dim, n) for n in kept], dim)
                setattr(layer, name, nn.Parameter(chosen, requires_grad=False))
    for name, tensor in tensors.items():
        path, _, kind = name.rpartition(".")
        setattr(cut.get_submodule(path), kind, nn.Parameter(tensor, requires_grad=False))
    return cut


@pytest.mark.parametrize("tensors", [{}, refit()], ids=["cut", "refit"])
def test_it_equals_the_sliced_policy_and_has_its_operators_and_weights(
    tensors: dict[str, Tensor],
    small_policy: CogACT,
    small_graph: fx.GraphModule,
    small_config: CompileConfig,
    small_inputs: Inputs,
) -> None:
    oracle, inputs = with_neurons(small_policy, tensors), (*small_inputs, TIME)
    cut, report = PruneVision(neurons=NEURONS, refit=(SIGLIP,) if tensors else (), tensors=tensors)(small_graph)
    assert torch.equal(cut(*inputs), NoisePrediction(oracle)(*inputs, cfg_scale=1.5))
    assert not torch.equal(cut(*inputs), small_graph(*inputs))
    assert (report.changes, report.exact) == (2, False)
    assert report.after == measure(cut) == measure(capture(oracle, small_config))
    assert report.after.ops == report.before.ops


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        PruneVision(neurons=NEURONS, refit=(SIGLIP,), tensors=refit())(small_graph)


def test_keeping_every_neuron_changes_nothing(small_graph: fx.GraphModule) -> None:
    same, report = PruneVision(neurons={DINO: tuple(range(28))})(small_graph)
    assert report.changes == 0
    assert all(tensor is dict(weights(small_graph))[name] for name, tensor in weights(same))


def test_its_name_gives_the_widths_rather_than_every_neuron() -> None:
    assert repr(PruneVision(neurons=NEURONS, refit=(SIGLIP,))) == "PruneVision(blocks=2, neurons=[4, 13], refit=1)"


@pytest.mark.parametrize("kept", [(), (3, 1), (1, 1), (-1, 4), (0, 28)])
def test_neurons_that_do_not_ascend_within_the_block_are_refused(
    small_graph: fx.GraphModule, kept: tuple[int, ...]
) -> None:
    with pytest.raises(PassError, match=r"dino_featurizer\.blocks\.0: neurons must ascend within 0\.\.27, at least"):
        PruneVision(neurons={DINO: kept})(small_graph)


def test_blocks_that_the_graph_does_not_have_are_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(
        PassError, match=r"no vision blocks \['vision_backbone.dino_featurizer.blocks.1'\] in the graph"
    ):
        PruneVision(neurons={DINO.replace(".0", ".1"): (0,)})(small_graph)
    with pytest.raises(PassError, match=r"are refit and not cut: name their neurons"):
        PruneVision(neurons={DINO: (0,)}, refit=(SIGLIP,), tensors=refit())(small_graph)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, r"no refit .*fc2\.weight: the tensors of the plan are others"),
        (
            refit(torch.float16),
            r"is torch\.float16\[12, 13\], the graph needs torch\.float32\[12, 13\]: calibrate again",
        ),
        (
            refit() | {f"{FC2}.bias": torch.zeros(13)},
            r"bias is torch\.float32\[13\], the graph needs torch\.float32\[12\]",
        ),
    ],
)
def test_other_tensors_than_those_of_the_block_are_refused(
    tensors: dict[str, Tensor], message: str, small_graph: fx.GraphModule
) -> None:
    with pytest.raises(PassError, match=message):
        PruneVision(neurons=NEURONS, refit=(SIGLIP,), tensors=tensors)(small_graph)


def test_a_weight_with_a_second_reader_and_a_block_of_another_form_are_refused(small_graph: fx.GraphModule) -> None:
    shared = copy_graph(small_graph)
    first, second = vision_blocks(shared.graph)
    first.up.args = (*first.up.args[:2], second.up.args[2])
    with pytest.raises(PassError, match=r"blocks\.0: the bias of its MLP's up projection is not a tensor of its own"):
        PruneVision(neurons={SIGLIP: (0, 1)})(shared)
    turned = copy_graph(small_graph)
    block = vision_blocks(turned.graph)[0]
    block.exit.args = (block.exit.args[1], block.exit.args[0])
    with pytest.raises(PassError, match=r"expected the MLP's output, scaled or not, to be added to what leaves"):
        PruneVision(neurons={DINO: (0, 1)})(turned)
