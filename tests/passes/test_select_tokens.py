"""`SelectTokens` against a selection by hand: one row at a time, unpadded, with explicit attention probabilities."""

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from evla_compile.errors import PassError
from evla_compile.families.cogact.model.language import rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import PassReport, copy_graph, propagate, replace_tensor
from evla_compile.graph.flops import product_flops
from evla_compile.graph.patch_groups import top
from evla_compile.graph.sites import decoder_layers, is_call, module_path, stage_node
from evla_compile.passes import PruneLayers, SelectTokens
from evla_compile.settings.tolerances import TOLERANCES, relative_error

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
NodeValues = Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]]
TIME = torch.tensor([30.0])
HALF = SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)
STAGES = ("key_patches", "task_patches", "diverse_patches", "kept_patches")


@pytest.fixture(scope="module")
def half(small_graph: fx.GraphModule) -> tuple[fx.GraphModule, PassReport]:
    return HALF(small_graph)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selected:
    """What a selection yields for one row."""

    relevance: Tensor
    patches: dict[str, list[int]]
    cognition: Tensor


def select_by_hand(
    policy: CogACT, layers: Sequence[nn.Module], inputs: Sequence[Tensor], budget: SelectTokens
) -> Selected:
    """Run one row (batch 1) without its padding, the decoder cut to `layers`."""
    image, input_ids, text_length = inputs[:3]
    decoder, count = policy.llm_backbone.llm.model, policy.sizes.patches
    text = decoder.embed_tokens(input_ids[:, : int(text_length)])
    hidden = torch.cat([text[:, :1], policy.projector(policy.vision_backbone(image)), text[:, 1:]], dim=1)
    rotary = rotary_tables(hidden, decoder.head_width)

    def run(layer: nn.Module, states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = layer(states, attention_mask=None, use_cache=False, position_embeddings=tables)
        return out

    hidden = run(layers[0], hidden, rotary)
    probabilities = attention_probabilities(layers[1], hidden, rotary).mean(0)
    relevance = probabilities[1 + count :, 1 : 1 + count].sum(0)
    hidden = run(layers[1], hidden, rotary)
    patches = choose(relevance, hidden[0, 1 : 1 + count].double(), budget)
    kept = [0, *(1 + i for i in patches["kept_patches"]), *range(1 + count, hidden.shape[1])]
    hidden, rotary = hidden[:, kept], (rotary[0][:, kept], rotary[1][:, kept])
    for layer in layers[2:]:
        hidden = run(layer, hidden, rotary)
    return Selected(relevance=relevance, patches=patches, cognition=decoder.norm(hidden)[:, -1:])


def attention_probabilities(layer: nn.Module, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Return float64 [heads,S,S]."""
    attention: Any = layer.self_attn
    normed: Tensor = layer.input_layernorm(hidden)  # type: ignore[operator]  # a submodule
    cos, sin = (table[0].double() for table in rotary)

    def rotated(projection: nn.Module) -> Tensor:
        x: Tensor = projection(normed)[0].double().unflatten(1, (-1, attention.head_dim)).transpose(0, 1)
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    logits: Tensor = rotated(attention.q_proj) @ rotated(attention.k_proj).transpose(1, 2) / attention.head_dim**0.5
    return logits.masked_fill(torch.ones(logits.shape[1:]).triu(1).bool(), -torch.inf).softmax(-1)


def choose(relevance: Tensor, states: Tensor, budget: SelectTokens) -> dict[str, list[int]]:
    def best(scores: Tensor, count: int, taken: Sequence[int]) -> list[int]:
        free = [i for i in range(len(scores)) if i not in taken]
        return sorted(free, key=lambda i: (-float(scores[i]), i))[:count]

    key = best(relevance, budget.key_tokens, [])
    unit = states / states.norm(dim=1, keepdim=True)
    diversity = 1 - (unit @ unit[key].T).max(dim=1).values
    task = best(relevance, int(budget.task_share * (budget.visual_tokens - len(key))), key)
    diverse = best(diversity, budget.visual_tokens - len(key) - len(task), [*key, *task])
    named = dict(zip(STAGES, (key, task, diverse, sorted([*key, *task, *diverse])), strict=True))
    return {stage: chosen for stage, chosen in named.items() if chosen}


@pytest.mark.parametrize(
    "budget",
    [
        replace(HALF, visual_tokens=6),
        HALF,  # an odd remainder, and with 9 text tokens a sequence as long as the patches were
        replace(HALF, visual_tokens=15, key_tokens=3, task_share=0.4),
        replace(HALF, visual_tokens=6, task_share=0.0),
        replace(HALF, visual_tokens=6, task_share=1.0),
        replace(HALF, visual_tokens=5, key_tokens=5),
    ],
    ids=repr,
)
def test_it_equals_the_selection_by_hand_of_each_unpadded_row(
    small_policy: CogACT,
    small_graph: fx.GraphModule,
    small_inputs: Inputs,
    node_values: NodeValues,
    budget: SelectTokens,
) -> None:
    selected, report = budget(small_graph)
    assert (report.changes, report.exact) == (1, False)
    values = node_values(selected, (*small_inputs, TIME))
    stages = {n.meta["stage"]: values[n] for n in selected.graph.nodes if "stage" in n.meta}
    for row in range(2):
        inputs = tuple(value[row : row + 1] for value in small_inputs)
        expected = select_by_hand(small_policy, list(small_policy.llm_backbone.llm.model.layers), inputs, budget)
        assert {stage: stages[stage][row].tolist() for stage in STAGES if stage in stages} == expected.patches
        relevance = relative_error(stages["relevance"][row].numpy(), expected.relevance.numpy())
        assert relevance <= TOLERANCES.importance
        cognition = relative_error(stages["cognition"][row].numpy(), expected.cognition[0].numpy())
        assert cognition <= TOLERANCES.cognition


def test_it_scores_in_the_second_layer_of_those_that_stay(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, node_values: NodeValues
) -> None:
    selected, _ = HALF(PruneLayers(keep=(0, 2, 3))(small_graph)[0])
    values = node_values(selected, (*small_inputs, TIME))
    layers = [small_policy.llm_backbone.llm.model.layers[i] for i in (0, 2, 3)]
    expected = select_by_hand(small_policy, layers, [value[1:] for value in small_inputs], HALF)
    assert values[stage_node(selected.graph, "kept_patches")][1].tolist() == expected.patches["kept_patches"]
    cognition = values[stage_node(selected.graph, "cognition")][1].numpy()
    assert relative_error(cognition, expected.cognition[0].numpy()) <= TOLERANCES.cognition


def test_attention_stays_fused_and_the_layers_keep_their_operators(
    small_graph: fx.GraphModule, half: tuple[fx.GraphModule, PassReport]
) -> None:
    selected, report = half
    before, after = (
        Counter((module_path(n), n.target) for n in gm.graph.nodes if n.op == "call_function")
        for gm in (small_graph, selected)
    )
    assert not before - after
    assert {path for path, _ in after - before} == {"select_tokens"}
    added = Counter({operator: count for (_, operator), count in (after - before).items()})
    assert added[aten.softmax.int] == 1
    assert added[aten.scaled_dot_product_attention.default] == added[aten.linear.default] == 0
    assert report.after.weight_bytes == report.before.weight_bytes


def test_the_layers_behind_it_compute_the_shorter_sequence_alone(
    small_graph: fx.GraphModule, half: tuple[fx.GraphModule, PassReport]
) -> None:
    batch, heads, width, mlp, text, patches = 2, 4, 32, 48, 9, 16

    def layer(length: int) -> int:
        return 2 * batch * length * (4 * width**2 + 3 * width * mlp) + 4 * batch * length**2 * width

    scores = 2 * batch * heads * (text - 1) * (text + patches) * (width // heads)
    diversity = 2 * batch * patches * HALF.key_tokens * width
    selected, report = half
    saved = 2 * (layer(text + patches) - layer(text + HALF.visual_tokens))
    before, after = (sum(map(product_flops, gm.graph.nodes)) for gm in (small_graph, selected))
    assert before - after == saved - scores - diversity
    linears = 2 * 2 * batch * (patches - HALF.visual_tokens) * (4 * width**2 + 3 * width * mlp)
    assert report.before.paper_flops - report.after.paper_flops == linears


def test_the_content_of_padding_does_not_matter(
    half: tuple[fx.GraphModule, PassReport], small_inputs: Inputs, node_values: NodeValues
) -> None:
    image, input_ids, text_length, noise = small_inputs
    other = input_ids.clone()
    other[0, 6:] = 63 - other[0, 6:]
    selected, _ = half
    values, others = (node_values(selected, (image, ids, text_length, noise, TIME)) for ids in (input_ids, other))
    for stage in ("relevance", "kept_patches", "cognition"):
        node = stage_node(selected.graph, stage)
        assert torch.equal(values[node], others[node])


def test_rows_of_a_batch_choose_independently(
    half: tuple[fx.GraphModule, PassReport], small_inputs: Inputs, node_values: NodeValues
) -> None:
    image, *rest = small_inputs
    other = torch.stack([image[0], 255 - image[1]])
    selected, _ = half
    values, others = (node_values(selected, (frames, *rest, TIME)) for frames in (image, other))
    relevance = stage_node(selected.graph, "relevance")
    assert torch.equal(values[relevance][0], others[relevance][0])
    assert not torch.equal(values[relevance][1], others[relevance][1])


def test_the_lower_index_wins_a_tie(small_graph: fx.GraphModule, small_inputs: Inputs, node_values: NodeValues) -> None:
    indifferent = copy_graph(small_graph)  # without queries, every text token attends to every patch alike
    weight = decoder_layers(indifferent.graph)[1].named("self_attn.q_proj").args[1]
    assert isinstance(weight, fx.Node)
    replace_tensor(indifferent, str(weight.target), torch.zeros(32, 32))
    propagate(indifferent)
    selected, _ = replace(HALF, visual_tokens=8, task_share=1.0)(indifferent)
    values = node_values(selected, (*small_inputs, TIME))
    assert values[stage_node(selected.graph, "key_patches")].tolist() == [[0, 1]] * 2
    assert values[stage_node(selected.graph, "task_patches")].tolist() == [[2, 3, 4, 5, 6, 7]] * 2


def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]]
) -> None:
    with untouched(small_graph):
        HALF(small_graph)


def test_keeping_every_patch_changes_nothing(small_graph: fx.GraphModule) -> None:
    same, report = replace(HALF, visual_tokens=16)(small_graph)
    assert report.changes == 0
    assert str(same.graph) == str(small_graph.graph)


@pytest.mark.parametrize(("visual_tokens", "key_tokens"), [(17, 2), (3, 4)])
def test_a_budget_outside_the_patches_is_refused(
    small_graph: fx.GraphModule, visual_tokens: int, key_tokens: int
) -> None:
    with pytest.raises(PassError, match=rf"visual_tokens={visual_tokens}: expected from key_tokens={key_tokens} to 16"):
        SelectTokens(visual_tokens=visual_tokens, key_tokens=key_tokens, task_share=0.5)(small_graph)


@pytest.mark.parametrize("settings", [{"key_tokens": 0}, {"task_share": -0.1}, {"task_share": 1.1}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(ValueError, match=rf"{name}={settings[name]}: expected"):
        replace(HALF, **settings)


def test_fewer_than_three_layers_are_refused(small_graph: fx.GraphModule) -> None:
    pruned, _ = PruneLayers(keep=(0, 1))(small_graph)
    with pytest.raises(
        PassError, match=r"needs 2 decoder layers below it and one above, and the graph has 2: keep more"
    ):
        HALF(pruned)


def test_a_second_selection_is_refused(half: tuple[fx.GraphModule, PassReport]) -> None:
    selected, _ = half
    with pytest.raises(PassError, match=r"selected already in front of llm_backbone\.llm\.model\.layers\.2"):
        replace(HALF, visual_tokens=4)(selected)


def test_attention_without_a_literal_scale_is_refused(small_graph: fx.GraphModule) -> None:
    unscaled = copy_graph(small_graph)
    attention = decoder_layers(unscaled.graph)[1].attention
    attention.kwargs = {}
    assert is_call(attention, aten.scaled_dot_product_attention.default)
    with pytest.raises(PassError, match=r"layers\.1: expected attention with a literal scale, found scale None"):
        HALF(unscaled)


def test_equal_scores_go_to_the_lower_index() -> None:
    graph = fx.Graph()
    scores = fx.Proxy(graph.placeholder("scores"), fx.proxy.GraphAppendingTracer(graph))
    graph.output(top(scores, 5).node)
    run = fx.GraphModule(nn.Module(), graph)
    rows = torch.tensor([[1.0, 2.0, 3.0, 2.0, 1.0, 2.0], [0.0] * 6])
    assert run(rows).tolist() == [[2, 1, 3, 5, 0], [0, 1, 2, 3, 4]]
    assert run(torch.zeros(1, 1000)).tolist() == [[0, 1, 2, 3, 4]]
