"""A finished graph as a chain: the same operators and tensors, run one graph after the other."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import pytest
import torch
from torch import Tensor, fx

import evla_compile as evla
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.errors import ExportError
from evla_compile.exporters.split import Piece, split
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import measure, weights
from evla_compile.graph.sites import verified_stages
from evla_compile.settings.anatomy import COGACT
from tests.paper_config import paper_config

CONFIG = paper_config(
    keep_layers=(0, 1, 3), mlp_keep=1.0, visual_tokens=7, key_tokens=2, cache_interval=2, ddim_steps=5, text_tokens=9,
    batch_size=2,
)  # fmt: skip
OUTPUTS = ("samples", "kept_patches", "layers.0", "cognition")


@pytest.fixture(scope="module")
def compiled(small_policy: CogACT) -> CompiledPolicy:
    return evla.compile(small_policy, CONFIG)


@pytest.fixture(scope="module")
def graph(compiled: CompiledPolicy) -> fx.GraphModule:
    return compiled.exposing(OUTPUTS)


def run(pieces: Sequence[Piece], inputs: Sequence[Tensor]) -> dict[str, Tensor]:
    values = dict(zip(COGACT.input_names, inputs, strict=True))
    with torch.no_grad():
        for piece in pieces:
            results = piece.graph(*(values[name] for name in piece.inputs))
            values |= zip(piece.outputs, results if isinstance(results, tuple) else (results,), strict=True)
    return values


@pytest.mark.parametrize("parts", [1, 2, 3, 4])
def test_a_chain_computes_what_the_graph_does(
    parts: int, graph: fx.GraphModule, small_inputs: Sequence[Tensor]
) -> None:
    pieces = split(graph, OUTPUTS, parts)
    found = run(pieces, small_inputs)
    with torch.no_grad():
        expected = dict(zip(OUTPUTS, graph(*small_inputs), strict=True))
    assert len(pieces) == parts
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    assert sum(measure(piece.graph).ops for piece in pieces) == measure(graph).ops
    assert sum(measure(piece.graph).flops for piece in pieces) == measure(graph).flops


def test_parts_are_named_by_what_they_compute(graph: fx.GraphModule) -> None:
    assert [piece.name for piece in split(graph, OUTPUTS, 1)] == ["policy"]
    assert [piece.name for piece in split(graph, OUTPUTS, 2)] == ["perception", "action"]
    assert [piece.name for piece in split(graph, OUTPUTS, 4)] == [
        "perception-1",
        "perception-2",
        "perception-3",
        "action",
    ]


def test_perception_hands_the_cognition_feature_to_the_action_head(graph: fx.GraphModule) -> None:
    perception, action = split(graph, OUTPUTS, 2)
    assert perception.inputs == ("image", "input_ids", "text_length")
    assert set(action.inputs) == {"noise", "cognition"}
    assert action.outputs == ("samples",)
    assert perception.handed_on == {"cognition"}
    assert not {name for name, _ in weights(perception.graph)} & {name for name, _ in weights(action.graph)}


def test_decoder_parts_hold_about_equal_weights(compiled: CompiledPolicy) -> None:
    graph = compiled.exposing(("samples",))
    pieces = split(graph, ("samples",), 4)
    layers = [{name.split(".")[4] for name, _ in weights(piece.graph) if ".layers." in name} for piece in pieces[:-1]]
    assert layers == [{"0"}, {"1"}, {"3"}]


def test_what_passes_between_parts_is_float32_or_whole_numbers(graph: fx.GraphModule) -> None:
    for piece in split(graph, OUTPUTS, 4):
        for node in piece.graph.graph.find_nodes(op="placeholder"):
            assert node.meta["val"].dtype in (torch.float32, torch.int64, torch.uint8)


def test_tensors_are_shared_and_the_graph_is_untouched(
    graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(graph):
        pieces = split(graph, OUTPUTS, 3)
    tensors = {id(tensor) for _, tensor in weights(graph)}
    assert {id(tensor) for piece in pieces for _, tensor in weights(piece.graph)} == tensors


def test_too_many_parts_are_refused(graph: fx.GraphModule) -> None:
    with pytest.raises(ExportError, match=r"parts=5: the policy keeps 3 decoder layers.*at most 4 parts"):
        split(graph, OUTPUTS, 5)


@pytest.mark.parametrize("parts", [0, -1, True, 1.0])
def test_a_number_of_parts_that_is_none_is_refused(parts: int, graph: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match="expected a whole number from 1 up"):
        split(graph, OUTPUTS, parts)


def test_a_graph_without_an_action_head_is_refused(compiled: CompiledPolicy) -> None:
    stages = verified_stages(compiled.graph.graph)
    assert "cognition" in stages
    with pytest.raises(ExportError, match="no action head"):
        split(compiled.exposing(("cognition",)), ("cognition",), 2)
