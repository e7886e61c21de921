"""A graph that is run stretch by stretch against the same graph run at once."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph import walk as module
from evla_compile.graph.sites import decoder_layers, stage_node
from evla_compile.graph.walk import GraphWalk
from evla_compile.passes import SelectTokens
from evla_compile.settings.budgets.tokens import TOKEN_RULES, TokenRule
from evla_compile.settings.config import CompileConfig

NodeValues = Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]]
TIME = torch.tensor([30.0])


def run(graph: fx.GraphModule, inputs: dict[str, Tensor], batch: int) -> tuple[Tensor, GraphWalk]:
    readout = stage_node(graph.graph, "cognition")
    walk = GraphWalk(graph, [*(layer.exit for layer in decoder_layers(graph.graph)), readout])
    values: dict[str, Any] = dict(inputs)
    for stretch in range(len(walk.stretches)):
        with walk.loaded(stretch):
            values = walk.run_stretch(stretch, values, batch)
    found: Tensor = values[readout.name]
    return found, walk


@pytest.mark.parametrize("limit", [1, 2**40], ids=["a stretch for every weight", "a stretch for every stop"])
def test_stretches_yield_what_the_graph_yields_at_once(
    limit: int,
    small_graph: fx.GraphModule,
    small_inputs: tuple[Tensor, ...],
    node_values: NodeValues,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "WEIGHT_LIMIT", limit)
    expected = node_values(small_graph, (*small_inputs, TIME))[stage_node(small_graph.graph, "cognition")]
    names = ("image", "input_ids", "text_length")
    found, walk = run(small_graph, dict(zip(names, small_inputs, strict=False)), 2)
    assert torch.equal(found, expected)
    assert (len(walk.stretches) == 5) == (limit > 1)


@pytest.mark.parametrize("rows", [[0], [0, 1, 1]])
def test_a_batch_may_have_another_size_than_the_capture(
    rows: list[int], small_graph: fx.GraphModule, small_inputs: tuple[Tensor, ...], node_values: NodeValues
) -> None:
    expected = node_values(small_graph, (*small_inputs, TIME))[stage_node(small_graph.graph, "cognition")]
    names = ("image", "input_ids", "text_length")
    inputs = {name: value[rows] for name, value in zip(names, small_inputs, strict=False)}
    found, _ = run(small_graph, inputs, len(rows))
    torch.testing.assert_close(found, expected[rows], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_a_selection_chooses_for_each_row_of_a_larger_batch(
    rule: TokenRule,
    *,
    merge: bool,
    small_policy: CogACT,
    small_inputs: tuple[Tensor, ...],
    node_values: NodeValues,
) -> None:
    """A capture at batch 1, as calibration has it: the choice of one row must not become that of another."""
    single = capture(small_policy, CompileConfig.dense(text_tokens=9))
    select = SelectTokens(visual_tokens=6, key_tokens=2, task_share=0.5, token_rule=rule, merge_tokens=merge)
    graph, _ = select(single)
    readout, names = stage_node(graph.graph, "cognition"), ("image", "input_ids", "text_length")
    expected = [
        node_values(graph, (*(value[row : row + 1] for value in small_inputs), TIME))[readout] for row in (0, 1)
    ]
    found, _ = run(graph, dict(zip(names, small_inputs, strict=False)), 2)
    torch.testing.assert_close(found, torch.cat(expected), rtol=1e-5, atol=1e-6)


def test_a_value_is_freed_behind_the_last_node_that_reads_it(
    small_graph: fx.GraphModule, small_inputs: tuple[Tensor, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At full size what a layer computes on the way is several times what leaves it."""
    monkeypatch.setattr(module, "WEIGHT_LIMIT", 2**40)
    readout = stage_node(small_graph.graph, "cognition")
    walk = GraphWalk(small_graph, [readout])
    (stretch,) = walk.stretches
    held: list[int] = []
    watch = {node: lambda _: held.append(len(walk.env) - len(walk._loaded)) for node in stretch}
    values = dict(zip(("image", "input_ids", "text_length"), small_inputs, strict=False))
    with walk.loaded(0):
        walk.run_stretch(0, values, 2, watch)
    assert len(held) == len(stretch)
    assert max(held) < 20 < len(stretch) / 5
