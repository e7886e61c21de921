"""Finding nodes in a graph, and refusing what is not there."""

from collections.abc import Callable

import pytest
import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import copy_graph
from evla_compile.graph.sites import (
    DecoderLayer,
    argument,
    decoder_layers,
    indexed_modules,
    input_node,
    module_path,
    nodes_under,
    stage_node,
)
from evla_compile.passes import FoldConstants, SpecializeShapes
from evla_compile.settings.anatomy import COGACT

aten = torch.ops.aten


def test_a_path_is_matched_by_whole_names_and_indices_by_number() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    for path in ("net.layers.10.mlp", "net.layers.1", "net.layers.2.attn.q", "net.layers.1.mlp", "net.layersx.1", ""):
        node = graph.call_function(aten.relu.default, (x,))
        node.meta["nn_module_stack"] = {"": ("", ""), path: (path, "")}
    assert [module_path(n) for n in nodes_under(graph, "net.layers.1")] == ["net.layers.1", "net.layers.1.mlp"]
    found = indexed_modules(graph, "net.layers")
    assert {index: len(nodes) for index, nodes in found.items()} == {1: 2, 2: 1, 10: 1}
    assert list(found) == [1, 2, 10]


def test_a_missing_stage_or_input_is_refused_with_those_that_exist(small_graph: fx.GraphModule) -> None:
    with pytest.raises(PassError, match=r"no stage 'relevance'; it has \['cognition', 'layers\.N', 'patches', 'proj"):
        stage_node(small_graph.graph, "relevance")
    with pytest.raises(PassError, match=r"no input 'frame'; its inputs are \['image', 'input_ids', 'noise', 'te.*"):
        input_node(small_graph.graph, "frame")


@pytest.mark.parametrize(("index", "found"), [(1, "0"), (2, "None")])
def test_an_argument_that_is_no_node_is_refused(index: int, found: str) -> None:
    graph = fx.Graph()
    node = graph.call_function(aten.add.Tensor, (graph.placeholder("x"), 0))
    assert argument(node, 0).name == "x"
    with pytest.raises(PassError, match=rf"expected a node as argument {index}, found {found}"):
        argument(node, index)


def test_a_decoder_layer_names_its_parts(small_graph: fx.GraphModule) -> None:
    _, layer, following, _ = decoder_layers(small_graph.graph)
    assert layer.path == f"{COGACT.decoder_layers}.1"
    assert layer.entry.meta["val"].shape[2] == layer.exit.meta["val"].shape[2] == 32
    assert following.entry is layer.exit
    assert [table.meta["val"].shape[2] for table in layer.rotary_tables] == [8, 8]
    assert str(argument(layer.named("mlp.down_proj"), 1).target) == f"{layer.path}.mlp.down_proj.weight"
    with pytest.raises(PassError, match=r"decoder layer 1: expected one linear node in mlp.fc1, found 0"):
        layer.named("mlp.fc1")


def test_a_static_layer_has_no_symbolic_length_and_folded_ones_no_rotary_tables(small_graph: fx.GraphModule) -> None:
    static, _ = SpecializeShapes(text_tokens=9)(small_graph)
    with pytest.raises(PassError, match=r"layers\.0: expected one symbolic sequence length, found \[\]"):
        _ = decoder_layers(static.graph)[0].length
    folded, _ = FoldConstants()(static)
    with pytest.raises(PassError, match=r"layers\.0: expected two rotary tables, found \[\]"):
        _ = decoder_layers(folded.graph)[0].rotary_tables


def without_fused_attention(layer: DecoderLayer) -> None:
    layer.attention.target = aten.add.Tensor


def with_one_residual_add(layer: DecoderLayer) -> None:
    layer.exit.target = aten.sub.Tensor


def with_a_second_entry(layer: DecoderLayer) -> None:
    argument(layer.exit, 0).args = (layer.entry, input_node(layer.entry.graph, "noise"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_fused_attention, "expected one fused attention, found 0"),
        (with_one_residual_add, "expected two residual adds, found 1"),
        (with_a_second_entry, "its first residual add has 2 inputs from outside, expected 1"),
    ],
)
def test_a_layer_of_another_form_is_refused(
    small_graph: fx.GraphModule, damage: Callable[[DecoderLayer], None], message: str
) -> None:
    other = copy_graph(small_graph)
    damage(decoder_layers(other.graph)[2])
    with pytest.raises(PassError, match=rf"layers\.2: {message}"):
        decoder_layers(other.graph)
