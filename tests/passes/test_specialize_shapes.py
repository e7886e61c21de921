"""`SpecializeShapes`: the same numbers, and no size left that is not a literal integer."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from evla_compile.errors import PassError
from evla_compile.graph.contract import copy_graph, inserting
from evla_compile.graph.sites import input_node
from evla_compile.passes import NarrowLastLayer, SelectTokens, SpecializeShapes

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


@pytest.fixture(scope="module")
def reduced(small_sampler: fx.GraphModule) -> fx.GraphModule:
    """With a selection and a narrowed last layer, which compute with the length."""
    return NarrowLastLayer()(SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)(small_sampler)[0])[0]


def scalars(gm: fx.GraphModule) -> list[fx.Node]:
    return [n for n in gm.graph.nodes if isinstance(n.meta.get("val"), int | torch.SymInt)]


def symbols(gm: fx.GraphModule) -> list[Any]:
    """Return every symbolic size in arguments, values and other metadata."""
    found = []
    for node in gm.graph.nodes:
        for leaf in pytree.tree_leaves(
            (node.args, dict(node.kwargs), node.meta.get("val"), node.meta.get("tensor_meta"))
        ):
            sizes = (*leaf.shape, *leaf.stride()) if isinstance(leaf, Tensor) else (leaf,)
            found += [size for size in sizes if isinstance(size, SYMBOLS)]
    return found


@pytest.mark.parametrize("name", ["small_sampler", "reduced"])
def test_the_same_numbers_come_from_literal_sizes(
    name: str, small_inputs: Inputs, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(name)
    static, report = SpecializeShapes(text_tokens=9)(graph)
    assert torch.equal(static(*small_inputs), graph(*small_inputs))
    assert symbols(graph)
    assert not symbols(static)
    assert not scalars(static)
    assert report.exact
    assert report.changes == len(scalars(graph)) > 0
    assert report.after == replace(report.before, ops=report.before.ops - report.changes)


def test_another_budget_than_that_of_capture_can_be_fixed(reduced: fx.GraphModule, small_inputs: Inputs) -> None:
    image, _, text_length, noise = small_inputs
    inputs = image, torch.randint(1, 64, (2, 12), generator=torch.Generator().manual_seed(1)), text_length, noise
    static, _ = SpecializeShapes(text_tokens=12)(reduced)
    assert torch.equal(static(*inputs), reduced(*inputs))
    assert input_node(static.graph, "input_ids").meta["val"].shape == (2, 12)
    assert not symbols(static)


def test_the_input_graph_is_untouched_and_stays_symbolic(
    reduced: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(reduced):
        SpecializeShapes(text_tokens=9)(reduced)


def test_fixing_the_same_budget_twice_changes_nothing(reduced: fx.GraphModule) -> None:
    once, _ = SpecializeShapes(text_tokens=9)(reduced)
    twice, report = SpecializeShapes(text_tokens=9)(once)
    assert report.changes == 0
    assert str(twice.graph) == str(once.graph)


def test_another_budget_for_a_static_graph_is_refused(reduced: fx.GraphModule) -> None:
    static, _ = SpecializeShapes(text_tokens=9)(reduced)
    with pytest.raises(PassError, match="text_tokens=10: the graph is static already, with 9 text tokens"):
        SpecializeShapes(text_tokens=10)(static)


@pytest.mark.parametrize("operator", [aten.nonzero.default, aten._local_scalar_dense.default])
def test_a_size_that_depends_on_data_is_refused_by_its_nodes_name(
    small_sampler: fx.GraphModule, operator: Callable[[fx.Proxy], fx.Proxy]
) -> None:
    dynamic = copy_graph(small_sampler)
    graph, output = dynamic.graph, dynamic.graph.output_node()
    with inserting(graph, output, "") as proxy:
        length = aten.slice.Tensor(proxy(input_node(graph, "text_length")), 0, 0, 1)
        read = operator(length)
    output.args = ((output.args[0], read.node),)
    with pytest.raises(PassError, match=rf"{read.node.name} = .*: its size depends on data and cannot be made static"):
        SpecializeShapes(text_tokens=9)(dynamic)
