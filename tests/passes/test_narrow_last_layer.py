"""`NarrowLastLayer` against the dense graph, and against its last layer computed by hand for one token."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn import functional
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from evla_compile.errors import PassError
from evla_compile.families.cogact.model.language import LlamaDecoder, rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import copy_graph
from evla_compile.graph.flops import product_flops
from evla_compile.graph.sites import argument, is_call, nodes_under, stage_node
from evla_compile.passes import NarrowLastLayer, PruneLayers, SelectTokens
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.tolerances import TOLERANCES, relative_error

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
NodeValues = Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]]
TIME = torch.tensor([30.0])
LAST = f"{COGACT.decoder_layers}.3"
BATCH, WIDTH, MLP, TEXT, PATCHES = 2, 32, 48, 9, 16


def cognition_by_hand(decoder: LlamaDecoder, patches: Tensor, input_ids: Tensor) -> Tensor:
    """Return [1,1,D] of one unpadded row: the last layer sees every key and value, and one query."""
    text = decoder.embed_tokens(input_ids)
    hidden = torch.cat([text[:, :1], patches, text[:, 1:]], dim=1)
    rotary = rotary_tables(hidden, decoder.head_width)
    *layers, last = decoder.layers
    for layer in layers:
        hidden = layer(hidden, attention_mask=None, use_cache=False, position_embeddings=rotary)
    attention: Any = last.self_attn
    normed = last.input_layernorm(hidden)  # type: ignore[operator]  # a submodule
    query, key, value = (
        projection(states).unflatten(2, (-1, decoder.head_width)).transpose(1, 2)
        for projection, states in (
            (attention.q_proj, normed[:, -1:]),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    query, _ = apply_rotary_pos_emb(query, query, *(table[:, -1:] for table in rotary))
    key, _ = apply_rotary_pos_emb(key, key, *rotary)
    attended = functional.scaled_dot_product_attention(query, key, value)
    row = hidden[:, -1:] + attention.o_proj(attended.transpose(1, 2).flatten(2))
    row = row + last.mlp(last.post_attention_layernorm(row))  # type: ignore[operator]  # submodules
    normed_row: Tensor = decoder.norm(row)
    return normed_row


def products(nodes: Iterable[fx.Node]) -> int:
    return sum(map(product_flops, nodes))


def test_it_equals_one_query_by_hand_on_each_unpadded_row(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, node_values: NodeValues
) -> None:
    narrowed, report = NarrowLastLayer()(small_graph)
    found = node_values(narrowed, (*small_inputs, TIME))[stage_node(narrowed.graph, "cognition")]
    image, input_ids, text_length, _ = small_inputs
    patches = small_policy.projector(small_policy.vision_backbone(image))
    for row in range(2):
        ids = input_ids[row : row + 1, : int(text_length[row])]
        expected = cognition_by_hand(small_policy.llm_backbone.llm.model, patches[row : row + 1], ids)
        assert relative_error(found[row].numpy(), expected[0].numpy()) <= TOLERANCES.cognition
    assert (report.changes, report.exact) == (1, True)


def test_samples_equal_the_dense_ones(small_sampler: fx.GraphModule, small_inputs: Inputs) -> None:
    narrowed, _ = NarrowLastLayer()(small_sampler)
    dense = small_sampler(*small_inputs)
    assert relative_error(narrowed(*small_inputs).numpy(), dense.numpy()) <= TOLERANCES.samples


def test_only_keys_and_values_are_computed_for_every_token(small_graph: fx.GraphModule) -> None:
    narrowed, report = NarrowLastLayer()(small_graph)
    length = PATCHES + TEXT
    keys_and_values = 2 * BATCH * length * 2 * WIDTH**2
    one_token = 2 * BATCH * (2 * WIDTH**2 + 3 * WIDTH * MLP)
    attention = 4 * BATCH * length * WIDTH
    last = products(nodes_under(narrowed.graph, LAST))
    assert last == keys_and_values + one_token + attention
    dense = products(nodes_under(small_graph.graph, LAST))
    assert products(small_graph.graph.nodes) - products(narrowed.graph.nodes) == dense - last
    assert report.before.paper_flops - report.after.paper_flops == 2 * BATCH * (length - 1) * (
        2 * WIDTH**2 + 3 * WIDTH * MLP
    )
    for operator in (aten.linear.default, aten.scaled_dot_product_attention.default):
        counts = [sum(is_call(n, operator) for n in gm.graph.nodes) for gm in (small_graph, narrowed)]
        assert counts[0] == counts[1]
    assert report.after.weight_bytes == report.before.weight_bytes


def test_the_content_of_padding_does_not_matter(small_graph: fx.GraphModule, small_inputs: Inputs) -> None:
    image, input_ids, text_length, noise = small_inputs
    other = input_ids.clone()
    other[0, 6:] = 63 - other[0, 6:]
    narrowed, _ = NarrowLastLayer()(small_graph)
    found, expected = (narrowed(image, ids, text_length, noise, TIME) for ids in (input_ids, other))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("keep", [(0, 1, 2, 3), (0, 1, 3)])  # with three layers, the last is the first after selection
def test_it_stays_exact_behind_a_selection(
    small_graph: fx.GraphModule, small_inputs: Inputs, keep: tuple[int, ...]
) -> None:
    pruned, _ = PruneLayers(keep=keep)(small_graph)
    selected, _ = SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)(pruned)
    narrowed, report = NarrowLastLayer()(selected)
    inputs = *small_inputs, TIME
    assert relative_error(narrowed(*inputs).numpy(), selected(*inputs).numpy()) <= TOLERANCES.samples
    length = 7 + TEXT
    assert (
        products(nodes_under(narrowed.graph, LAST))
        == 2 * BATCH * (length * 2 * WIDTH**2 + 2 * WIDTH**2 + 3 * WIDTH * MLP) + 4 * BATCH * length * WIDTH
    )
    assert report.changes == 1


def test_a_single_layer_can_be_narrowed(small_graph: fx.GraphModule, small_inputs: Inputs) -> None:
    pruned, _ = PruneLayers(keep=(2,))(small_graph)
    narrowed, _ = NarrowLastLayer()(pruned)
    inputs = *small_inputs, TIME
    assert relative_error(narrowed(*inputs).numpy(), pruned(*inputs).numpy()) <= TOLERANCES.samples


def test_a_bfloat16_decoder_keeps_its_dtype(
    small_bfloat16_graph: fx.GraphModule, small_inputs: Inputs, node_values: NodeValues
) -> None:
    selected, _ = SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)(small_bfloat16_graph)
    narrowed, _ = NarrowLastLayer()(selected)
    found, expected = (
        node_values(gm, (*small_inputs, TIME))[stage_node(gm.graph, "cognition")] for gm in (narrowed, selected)
    )
    (attention,) = (
        n for n in nodes_under(narrowed.graph, LAST) if is_call(n, aten.scaled_dot_product_attention.default)
    )
    mask = argument(attention, 3).meta["val"]
    assert found.dtype == expected.dtype == mask.dtype == torch.bfloat16
    assert torch.allclose(found, expected, rtol=0, atol=4 * 2**-8 * float(expected.abs().max()))  # a few roundings


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        NarrowLastLayer()(small_graph)


def test_narrowing_twice_changes_nothing(small_graph: fx.GraphModule) -> None:
    once, _ = NarrowLastLayer()(small_graph)
    twice, report = NarrowLastLayer()(once)
    assert report.changes == 0
    assert str(twice.graph) == str(once.graph)


def test_a_cognition_token_that_is_not_read_off_the_text_is_refused(small_graph: fx.GraphModule) -> None:
    other = copy_graph(small_graph)
    readout = stage_node(other.graph, "cognition")
    readout.args = (readout.args[0].args[0], *readout.args[1:])  # type: ignore[union-attr]  # the slice of the text
    with pytest.raises(
        PassError, match=r"cognition token is gathered from .*, expected a slice of the final norm's text"
    ):
        NarrowLastLayer()(other)


def test_a_graph_without_a_cognition_stage_is_refused(small_graph: fx.GraphModule) -> None:
    other = copy_graph(small_graph)
    del stage_node(other.graph, "cognition").meta["stage"]
    with pytest.raises(PassError, match=r"no stage 'cognition'; it has \['layers\.N', 'patches', 'projected'\]"):
        NarrowLastLayer()(other)
