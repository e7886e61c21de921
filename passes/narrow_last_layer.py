"""Compute the last decoder layer for the cognition token alone."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, Value, inserting
from evla_compile.graph.sites import DecoderLayer, argument, decoder_layers, input_node, is_call, stage_node
from evla_compile.settings.anatomy import COGNITION, INPUT_IDS, TEXT_LENGTH

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class NarrowLastLayer(GraphPass):
    """Give the last kept decoder layer one query, the cognition token, exact.

    Only that token's final state reaches the action head, so queries, output projection and MLP need its row alone;
    keys and values need all rows. Three things change:

    1. the query path and the residual read one row, that of the text's last real token, gathered from what they read;
    2. their views, and those behind the attention, get a sequence length of 1;
    3. the keys of the padding are masked: a single query is not causal, so nothing else hides what follows it.

    A graph that is narrowed already stays as it is. Refuses a graph whose cognition feature is not gathered from the
    text of the final norm.

    Shape legend: B batch, S sequence, T text budget, D decoder width, E head width, W width of any rows.
    """

    exact: ClassVar[bool] = True

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Move the gather of the cognition token from behind the final norm into the last layer."""
        graph = gm.graph
        readout = stage_node(graph, COGNITION)
        if not is_call(readout, aten.gather.default):
            return 0  # narrowed already: the cognition feature is the final norm itself
        text = argument(readout, 0)
        if not is_call(text, aten.slice.Tensor):
            raise PassError(f"the cognition token is gathered from {text}, expected a slice of the final norm's text")
        layer = decoder_layers(graph)[-1]
        length, queries = layer.length, _query_path(layer)
        _rewire(layer, queries, length, _picks(layer, queries))  # 1 and 2
        _mask_padding(layer, length)  # 3
        normed = argument(text, 0)
        normed.meta["stage"] = readout.meta.pop("stage")
        readout.replace_all_uses_with(normed)
        return 1


def _query_path(layer: DecoderLayer) -> list[fx.Node]:
    """Return the nodes that only the query needs: its projection, its rotation and its views."""
    query, key, value = (_ancestors(argument(layer.attention, index), set(layer.nodes)) for index in range(3))
    return [node for node in layer.nodes if node in query - key - value]


def _ancestors(node: fx.Node, inside: set[fx.Node]) -> set[fx.Node]:
    """Return the nodes within `inside` that `node` is computed from, itself included."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in inside and current not in found:
            found.add(current)
            pending += current.all_input_nodes
    return found


def _picks(layer: DecoderLayer, queries: list[fx.Node]) -> dict[fx.Node, fx.Node]:
    """Write the cognition token's row of everything that the query path and the residual read; map each to its row."""
    graph, batch = layer.exit.graph, layer.exit.meta["val"].shape[0]
    inside = set(queries)
    read = dict.fromkeys(a for node in queries for a in node.all_input_nodes if a not in inside and a.op != "get_attr")
    picks = {}
    for source in [layer.entry, *(node for node in read if isinstance(node.meta["val"], torch.Tensor))]:
        before = layer.nodes[0] if source is layer.entry else source.next
        with inserting(graph, before, layer.path) as proxy:
            row = _cognition_row(graph, proxy(input_node(graph, TEXT_LENGTH)))
            picks[source] = _pick(proxy(source), source, row, proxy(input_node(graph, INPUT_IDS)), batch).node
    return picks


def _cognition_row(graph: fx.Graph, text_length: Value) -> Value:
    """Return the cognition token's row among the text behind the image, int64 [B,1,1]."""
    return aten.unsqueeze.default(aten.unsqueeze.default(aten.sub.Tensor(text_length, 2), 1), 2)


def _pick(value: Value, node: fx.Node, row: Value, input_ids: Value, batch: int) -> Value:
    """Return one row, [B,1,W] of [B,S,W], or [B,1,1,E] of a rotary table [1 or B,1,S,E], which all heads share."""
    shape = node.meta["val"].shape
    if len(shape) == 4:  # [B,1,S,E] and [B,1,1,1]
        value, row = aten.expand.default(value, [batch, -1, -1, -1]), aten.unsqueeze.default(row, 1)
    text = aten.slice.Tensor(value, len(shape) - 2, 1 - aten.sym_size.int(input_ids, 1))  # [B,T-1,W], [B,1,T-1,E]
    return aten.gather.default(text, len(shape) - 2, aten.expand.default(row, [-1] * (len(shape) - 1) + [shape[-1]]))


def _rewire(layer: DecoderLayer, queries: list[fx.Node], length: fx.Node, picks: dict[fx.Node, fx.Node]) -> None:
    """Let queries, residual and what follows the attention compute one row: picked inputs, and views of length 1."""
    residual = next(user for user in layer.entry.users if user in layer.nodes and is_call(user, aten.add.Tensor))
    behind = layer.nodes[layer.nodes.index(layer.attention) + 1 :]
    for node in [*queries, *behind, residual]:
        node.args = fx.map_arg(node.args, lambda read: 1 if read is length else picks.get(read, read))


def _mask_padding(layer: DecoderLayer, length: fx.Node) -> None:
    """Replace causality, which one query no longer implies, by a mask of the keys behind the cognition token."""
    graph, attention = layer.exit.graph, layer.attention
    states = layer.entry.meta["val"]
    with inserting(graph, attention, layer.path) as proxy:
        position = aten.arange.default(proxy(length), dtype=torch.int64, device=states.device)  # [S]
        patches = proxy(length) - aten.sym_size.int(proxy(input_node(graph, INPUT_IDS)), 1)
        real = aten.add.Tensor(proxy(input_node(graph, TEXT_LENGTH)), patches)  # [B]: rows that are no padding
        hidden = aten.ge.Tensor(position, aten.unsqueeze.default(real, 1))  # [B,S]
        mask = aten.masked_fill.Scalar(aten.zeros_like.default(hidden, dtype=states.dtype), hidden, -torch.inf)
        mask = aten.unsqueeze.default(aten.unsqueeze.default(mask, 1), 1)  # [B,1,1,S]
    query, key, value, *_ = attention.args
    attention.args = (query, key, value, mask.node, 0.0, False)
