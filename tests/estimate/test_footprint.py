"""What nodes hold and compute: on a graph by hand, and a policy's components against its whole."""

import pytest
import torch
from torch import Tensor, fx, nn

from evla_compile.estimate.footprint import Footprint, footprint, footprint_by_component
from evla_compile.graph.contract import measure
from evla_compile.graph.flops import flops_by_component


class Toy(nn.Module):
    """An embedding and two layers that share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.weight = nn.Parameter(torch.zeros(4, 4))

    def forward(self, ids: Tensor) -> Tensor:
        hidden = nn.functional.linear(self.embedding(ids), self.weight)
        return nn.functional.linear(hidden, self.weight)


@pytest.fixture(scope="module")
def toy() -> fx.GraphModule:
    gm = torch.export.export(Toy(), (torch.zeros(1, 3, dtype=torch.int64),)).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def operators(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.op == "call_function"]


def test_a_shared_weight_is_held_once_and_an_embedding_is_read_by_the_row(toy: fx.GraphModule) -> None:
    assert footprint(toy, operators(toy)) == Footprint(
        ops=3,
        flops=2 * 2 * 3 * 16,
        paper_flops=2 * 2 * 3 * 16,
        parameters=40 + 16,
        weight_bytes=4 * (40 + 16),
        read_bytes=4 * (12 + 16),
    )


def test_a_weight_that_other_nodes_read_too_is_not_held_by_some_of_them(toy: fx.GraphModule) -> None:
    found = footprint(toy, operators(toy)[-1:])
    assert (found.ops, found.flops, found.parameters, found.read_bytes) == (1, 2 * 3 * 16, 0, 0)


def test_footprints_add_and_multiply_field_by_field() -> None:
    one = Footprint(ops=1, flops=2, paper_flops=3, parameters=4, weight_bytes=5, read_bytes=6)
    assert one + one * 2 == Footprint(ops=3, flops=6, paper_flops=9, parameters=12, weight_bytes=15, read_bytes=18)


def test_the_components_of_a_policy_add_up_to_its_graph(small_sampler: fx.GraphModule) -> None:
    components, whole = footprint_by_component(small_sampler), measure(small_sampler)
    total = components["vision"] + components["language"] + components["action"]
    assert (total.ops, total.flops, total.paper_flops, total.weight_bytes) == (
        whole.ops,
        whole.flops,
        whole.paper_flops,
        whole.weight_bytes,
    )
    assert {component: found.flops for component, found in components.items()} == flops_by_component(
        small_sampler, "all"
    )
    assert {component: found.paper_flops for component, found in components.items()} == flops_by_component(
        small_sampler, "paper"
    )
