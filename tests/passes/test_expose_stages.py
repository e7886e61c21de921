"""`ExposeStages` against the values of the nodes themselves."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import weights
from evla_compile.graph.sites import nodes_under, stage_node
from evla_compile.passes import ExposeStages
from evla_compile.settings.anatomy import COGACT

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def test_outputs_are_the_named_values_in_the_given_order(
    small_sampler: fx.GraphModule,
    small_inputs: Inputs,
    node_values: Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]],
) -> None:
    exposed, report = ExposeStages(stages=("cognition", "samples", "patches"))(small_sampler)
    cognition, samples, patches = exposed(*small_inputs)
    values = node_values(small_sampler, small_inputs)
    assert torch.equal(cognition, values[stage_node(small_sampler.graph, "cognition")])
    assert torch.equal(samples, small_sampler(*small_inputs))
    assert torch.equal(patches, values[stage_node(small_sampler.graph, "patches")])
    assert (report.changes, report.exact) == (3, True)
    assert report.after == report.before


def test_what_no_named_stage_needs_is_gone_with_its_weights(small_sampler: fx.GraphModule) -> None:
    exposed, _ = ExposeStages(stages=("projected",))(small_sampler)
    assert not nodes_under(exposed.graph, COGACT.denoising)
    assert {name.split(".")[0] for name, _ in weights(exposed) if "." in name} == {"vision_backbone", "projector"}


def test_the_input_graph_is_untouched(
    small_sampler: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_sampler):
        ExposeStages(stages=("patches",))(small_sampler)


@pytest.mark.parametrize("stages", [(), ("patches", "patches")])
def test_no_names_and_repeated_names_are_refused(small_sampler: fx.GraphModule, stages: tuple[str, ...]) -> None:
    with pytest.raises(PassError, match="expected at least one name, each once"):
        ExposeStages(stages=stages)(small_sampler)


def test_an_unknown_name_is_refused_with_those_that_exist(small_sampler: fx.GraphModule) -> None:
    with pytest.raises(
        PassError,
        match=r"no stage 'logits'; it has \['cognition', 'denoising\.N', 'layers\.N', 'patches', 'projected'\]",
    ):
        ExposeStages(stages=("samples", "logits"))(small_sampler)
