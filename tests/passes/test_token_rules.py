"""Rules of `SelectTokens` besides the paper's, and merging, against loops over plain numbers, row by row."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.language import rotary_tables
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import copy_graph
from evla_compile.graph.flops import product_flops
from evla_compile.graph.patch_groups import merge_weights, similarity, spread
from evla_compile.graph.sites import decoder_layers, module_path, stage_node
from evla_compile.passes import FoldConstants, NarrowLastLayer, SelectTokens, SpecializeShapes
from evla_compile.passes.select_tokens import grid_patches, random_patches
from evla_compile.settings.budgets.tokens import TOKEN_RULES, TokenRule
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.tolerances import TOLERANCES, relative_error

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]
NodeValues = Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]]
TIME = torch.tensor([30.0])
SEVEN = SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)
SCORED: tuple[TokenRule, ...] = ("relevance", "coverage", "fastv")
COVERAGE = replace(SEVEN, token_rule="coverage", merge_tokens=True)


def dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def best(scores: Sequence[float], free: Sequence[int]) -> int:
    """Return the patch of the highest score, the lower index among equals."""
    chosen = free[0]
    for patch in free:
        if scores[patch] > scores[chosen]:
            chosen = patch
    return chosen


def cosines(states: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return u_i . u_j of the centred states."""
    mean = [math.fsum(column) / len(states) for column in zip(*states, strict=True)]
    centred = [[value - m for value, m in zip(state, mean, strict=True)] for state in states]
    unit = [[value / math.sqrt(dot(state, state)) for value in state] for state in centred]
    return [[dot(a, b) for b in unit] for a in unit]


def cover_by_hand(scores: Sequence[float], similar: Sequence[Sequence[float]], count: int) -> list[int]:
    chosen = [best(scores, range(len(scores)))]
    while len(chosen) < count:
        free = [patch for patch in range(len(scores)) if patch not in chosen]
        distance = [1 - max(similar[patch][k] for k in chosen) for patch in range(len(scores))]
        chosen.append(best(distance, free))
    return sorted(chosen)


def groups_by_hand(scores: Sequence[float], states: Sequence[Sequence[float]], rule: SelectTokens) -> list[int]:
    chosen: list[int] = []

    def add(values: Sequence[float], count: int) -> None:
        for _ in range(count):
            chosen.append(best(values, [patch for patch in range(len(scores)) if patch not in chosen]))

    add(scores, rule.key_tokens)
    unit = [[value / math.sqrt(dot(state, state)) for value in state] for state in states]
    distance = [1 - max(dot(state, unit[k]) for k in chosen) for state in unit]
    add(scores, int(rule.task_share * (rule.visual_tokens - rule.key_tokens)))
    add(distance, rule.visual_tokens - len(chosen))
    return sorted(chosen)


def merge_by_hand(kept: Sequence[int], similar: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return the weights, a row for each kept patch."""
    groups: list[list[int]] = [[patch] for patch in kept]
    for patch in range(len(similar)):
        if patch not in kept:
            nearest = best([similar[patch][k] for k in kept], range(len(kept)))
            groups[nearest].append(patch)
    return [[1 / len(group) if patch in group else 0.0 for patch in range(len(similar))] for group in groups]


def attention_by_hand(policy: CogACT, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> list[list[list[float]]]:
    """Return the second layer's attention probabilities of an unpadded row, by query head, row and column."""
    layer: Any = policy.llm_backbone.llm.model.layers[1]
    width = layer.self_attn.head_dim
    normed = layer.input_layernorm(hidden)
    cos, sin = (table[0].double() for table in rotary)

    def rotated(projection: Any) -> list[Any]:
        x = projection(normed)[0].double().unflatten(1, (-1, width)).transpose(0, 1)
        first, second = x.chunk(2, dim=-1)
        turned: list[Any] = (x * cos + torch.cat([-second, first], dim=-1) * sin).tolist()
        return turned

    queries, keys = rotated(layer.self_attn.q_proj), rotated(layer.self_attn.k_proj)
    shared = len(queries) // len(keys)  # query heads to a key head
    found: list[list[list[float]]] = []
    for head, rows in enumerate(queries):
        found.append([])
        for place, row in enumerate(rows):
            weights = [math.exp(dot(row, key) / math.sqrt(width)) for key in keys[head // shared][: place + 1]]
            found[-1].append([weight / math.fsum(weights) for weight in weights])
    return found


def select_by_hand(policy: CogACT, inputs: Sequence[Tensor], rule: SelectTokens) -> dict[str, Any]:
    """Run one row (batch 1) without its padding."""
    image, input_ids, text_length = inputs[:3]
    decoder, patches = policy.llm_backbone.llm.model, policy.sizes.patches
    text = decoder.embed_tokens(input_ids[:, : int(text_length)])
    hidden = torch.cat([text[:, :1], policy.projector(policy.vision_backbone(image)), text[:, 1:]], dim=1)
    rotary = rotary_tables(hidden, decoder.head_width)

    def run(layer: Any, states: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        out: Tensor = layer(states, attention_mask=None, use_cache=False, position_embeddings=tables)
        return out

    hidden = run(decoder.layers[0], hidden, rotary)
    heads = attention_by_hand(policy, hidden, rotary)
    hidden = run(decoder.layers[1], hidden, rotary)
    last = hidden.shape[1] - 1
    rows = [last] if rule.token_rule == "fastv" else range(1 + patches, last + 1)
    scores = [math.fsum(head[row][1 + i] / len(heads) for head in heads for row in rows) for i in range(patches)]
    states = hidden[0, 1 : 1 + patches].double()
    similar = cosines(states.tolist())
    if rule.token_rule == "coverage":
        kept = cover_by_hand(scores, similar, rule.visual_tokens)
    elif rule.token_rule == "fastv":
        kept = sorted(sorted(range(patches), key=lambda i: (-scores[i], i))[: rule.visual_tokens])
    elif rule.token_rule == "uniform":
        kept = [1, 3, 9, 11, 12, 14, 15]  # of seven in a drawing of 4 x 4
    elif rule.token_rule == "relevance":
        kept = groups_by_hand(scores, states.tolist(), rule)
    else:
        kept = list(random_patches(patches, rule.visual_tokens, rule.token_seed))
    weights = merge_by_hand(kept, similar) if rule.merge_tokens else None
    visual = states[kept] if weights is None else torch.tensor(weights, dtype=torch.float64) @ states
    places = [0, *(1 + i for i in kept), *range(1 + patches, hidden.shape[1])]
    hidden = torch.cat([hidden[:, :1], visual[None].float(), hidden[:, 1 + patches :]], dim=1)
    rotary = (rotary[0][:, places], rotary[1][:, places])
    for layer in decoder.layers[2:]:
        hidden = run(layer, hidden, rotary)
    found = {"kept_patches": kept, "cognition": decoder.norm(hidden)[0, -1:]}
    if rule.token_rule in SCORED:
        found["relevance"] = torch.tensor(scores)
    return found if weights is None else found | {"merge_weights": torch.tensor(weights)}


def check_rows(policy: CogACT, graph: fx.GraphModule, inputs: Inputs, values: NodeValues, rule: SelectTokens) -> None:
    selected, report = rule(graph)
    assert (report.changes, report.exact) == (1, False)
    found = values(selected, (*inputs, TIME))
    stages = {node.meta["stage"]: found[node] for node in selected.graph.nodes if "stage" in node.meta}
    for row in range(2):
        expected = select_by_hand(policy, tuple(value[row : row + 1] for value in inputs), rule)
        assert stages["kept_patches"][row].tolist() == expected["kept_patches"]
        assert ("relevance" in stages, "merge_weights" in stages) == ("relevance" in expected, rule.merge_tokens)
        if "relevance" in expected:
            error = relative_error(stages["relevance"][row].numpy(), expected["relevance"].numpy())
            assert error <= TOLERANCES.importance
        if rule.merge_tokens:
            torch.testing.assert_close(stages["merge_weights"][row], expected["merge_weights"], rtol=1e-6, atol=0)
        cognition = relative_error(stages["cognition"][row].numpy(), expected["cognition"].numpy())
        assert cognition <= TOLERANCES.cognition
    if rule.token_rule in SCORED:
        assert stages["kept_patches"][0].tolist() != stages["kept_patches"][1].tolist()


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_every_rule_equals_loops_over_each_unpadded_row(
    small_policy: CogACT,
    small_graph: fx.GraphModule,
    small_inputs: Inputs,
    node_values: NodeValues,
    rule: TokenRule,
    merge: bool,
) -> None:
    budget = replace(SEVEN, token_rule=rule, merge_tokens=merge, token_seed=5)
    check_rows(small_policy, small_graph, small_inputs, node_values, budget)


@pytest.mark.parametrize("count", [1, 2, 15])
def test_coverage_takes_every_budget(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: Inputs, node_values: NodeValues, count: int
) -> None:
    check_rows(small_policy, small_graph, small_inputs, node_values, replace(COVERAGE, visual_tokens=count))


@pytest.mark.parametrize("rule", SCORED)
def test_each_query_head_of_a_shared_key_head_counts(
    small_grouped_policy: CogACT,
    small_config: CompileConfig,
    small_inputs: Inputs,
    node_values: NodeValues,
    rule: TokenRule,
) -> None:
    graph = capture(small_grouped_policy, small_config)
    check_rows(small_grouped_policy, graph, small_inputs, node_values, replace(SEVEN, token_rule=rule))


def test_equal_patches_go_by_index() -> None:
    """Four patches, each three times over: a copy is chosen where nothing else is left, the first one first."""
    corners = torch.tensor([[3.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [0.0, -2.0]])  # cosines without rounding
    states = corners.repeat(3, 1).expand(2, -1, -1)
    scores = torch.stack([torch.zeros(12), (torch.arange(12) % 3 == 1).float()])
    similar = similarity(states, 12, torch.arange)
    exact = cosines(states[0].tolist())
    for count in range(1, 13):
        kept = spread(similar, scores, count, 12)
        assert kept.tolist() == [cover_by_hand(row.tolist(), exact, count) for row in scores]
    for row in ([2, 3, 4, 5, 6], [0, 1, 2, 4, 7]):
        weights = merge_weights(similar, torch.tensor([row, row]), 5, 12, torch.arange)
        torch.testing.assert_close(weights, torch.tensor([merge_by_hand(row, exact)] * 2), rtol=1e-6, atol=0)


def test_patches_without_any_difference_are_kept_from_the_first_on() -> None:
    similar = similarity(torch.full((1, 6, 4), 0.3), 6, torch.arange)
    kept = spread(similar, torch.zeros(1, 6), 3, 6)
    assert kept.tolist() == [[0, 1, 2]]
    weights = merge_weights(similar, kept, 3, 6, torch.arange)
    assert weights.tolist() == [[[0.25, 0, 0, 0.25, 0.25, 0.25], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 0, 0]]]


@pytest.mark.parametrize(
    ("patches", "count", "drawing"),
    [
        (16, 1, ".... .... ..x. ...."),
        (16, 4, ".... .x.x .... .x.x"),
        (16, 7, ".x.x .... .x.x x.xx"),
        (16, 15, "x.xx xxxx xxxx xxxx"),
        (9, 6, "xxx ... xxx"),
        (64, 14, "........ .x..x.x. ........ .x.x.x.x ........ .x..x.x. ........ .x.x.x.x"),
    ],
)
def test_the_grid_is_even(patches: int, count: int, drawing: str) -> None:
    cells = drawing.replace(" ", "")
    assert grid_patches(patches, count) == tuple(i for i, cell in enumerate(cells) if cell == "x")


def test_the_grid_has_every_budget() -> None:
    for side in range(1, 17):
        for count in range(1, side**2 + 1):
            chosen = grid_patches(side**2, count)
            assert len(chosen) == count
            assert sorted(set(chosen)) == list(chosen)
            assert 0 <= chosen[0] <= chosen[-1] < side**2
    with pytest.raises(PassError, match="expected a square grid of patches, found 12 patches"):
        grid_patches(12, 3)


def test_random_patches_are_of_their_seed() -> None:
    numbers = np.random.default_rng(0).random(64).tolist()
    assert list(random_patches(64, 14, 0)) == sorted(sorted(range(64), key=lambda patch: numbers[patch])[:14])
    assert random_patches(64, 14, 0) == (2, 3, 11, 13, 15, 20, 21, 32, 48, 53, 55, 59, 61, 62)
    draws = [random_patches(64, 14, seed) for seed in range(50)]
    assert len(set(draws)) == 50
    assert all(len(set(draw)) == 14 and list(draw) == sorted(draw) for draw in draws)
    assert {patch for draw in draws for patch in draw} == set(range(64))


@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_the_kept_patches_are_still_found_in_the_finished_graph(
    small_sampler: fx.GraphModule, small_inputs: Inputs, node_values: NodeValues, rule: TokenRule
) -> None:
    budget = replace(SEVEN, token_rule=rule, merge_tokens=True, token_seed=5)
    graph = budget(small_sampler)[0]
    for rewrite in (NarrowLastLayer(), SpecializeShapes(text_tokens=9), FoldConstants()):
        graph = rewrite(graph)[0]
    values = node_values(graph, small_inputs)
    kept, weights = (values[stage_node(graph.graph, name)] for name in ("kept_patches", "merge_weights"))
    assert (kept.shape, kept.dtype) == ((2, 7), torch.int64)
    assert (weights.shape, weights.dtype) == ((2, 7, 16), torch.float32)
    torch.testing.assert_close(weights.sum(2), torch.ones(2, 7))
    assert (weights.gather(2, kept[:, :, None]) > 0).all()
    assert (2, 7, 32) not in [tensor.shape for tensor in graph.buffers()]  # indices repeated for every column


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_it_adds_no_weight_and_no_product_but_its_own(
    small_graph: fx.GraphModule, rule: TokenRule, merge: bool
) -> None:
    def products(graph: fx.GraphModule) -> int:
        return sum(product_flops(node) for node in graph.graph.nodes if module_path(node) == "select_tokens")

    batch, patches, count, width, heads, text = 2, 16, 7, 32, 4, 9
    rows = {"relevance": text - 1, "coverage": text - 1, "fastv": 1}.get(rule, 0)
    expected = 2 * batch * heads * rows * (text + patches) * (width // heads)
    if rule == "relevance":
        expected += 2 * batch * patches * SEVEN.key_tokens * width
    if rule == "coverage" or merge:
        expected += 2 * batch * patches**2 * width
    if merge:
        expected += 2 * batch * count * patches * width
    selected, report = replace(SEVEN, token_rule=rule, merge_tokens=merge)(small_graph)
    assert products(selected) == expected
    indices = 8 * count if rule in ("uniform", "random") else 0
    assert report.after.weight_bytes == report.before.weight_bytes + indices
    before, after = (
        Counter((module_path(n), n.target) for n in graph.graph.nodes if n.op == "call_function")
        for graph in (small_graph, selected)
    )
    assert not before - after
    assert {path for path, _ in after - before} == {"select_tokens"}


def test_a_step_of_coverage_is_four_operators_for_every_batch(
    small_policy: CogACT, small_graph: fx.GraphModule
) -> None:
    single = capture(small_policy, CompileConfig.dense(text_tokens=9))
    for graph in (single, small_graph):
        few, more = (replace(COVERAGE, visual_tokens=count)(graph)[1].after.ops for count in (5, 6))
        assert more - few == 4


def test_its_name_gives_what_the_rule_reads() -> None:
    assert repr(SEVEN) == "SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)"
    spread_and_merged = replace(SEVEN, token_rule="coverage", merge_tokens=True)
    assert repr(spread_and_merged) == "SelectTokens(visual_tokens=7, token_rule='coverage', merge_tokens=True)"
    drawn = replace(SEVEN, token_rule="random", token_seed=4)
    assert repr(drawn) == "SelectTokens(visual_tokens=7, token_rule='random', token_seed=4)"


@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_the_input_graph_is_untouched(
    small_graph: fx.GraphModule, untouched: Callable[[fx.GraphModule], AbstractContextManager[None]], rule: TokenRule
) -> None:
    with untouched(small_graph):
        replace(SEVEN, token_rule=rule, merge_tokens=True)(small_graph)


@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_keeping_every_patch_changes_nothing(small_graph: fx.GraphModule, rule: TokenRule) -> None:
    same, report = replace(SEVEN, visual_tokens=16, token_rule=rule, merge_tokens=True)(small_graph)
    assert report.changes == 0
    assert str(same.graph) == str(small_graph.graph)


def test_an_unknown_rule_and_a_budget_outside_the_patches_are_refused(small_graph: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match="token_rule='nearest': expected one of relevance, coverage, uniform"):
        replace(SEVEN, token_rule="nearest")  # type: ignore[arg-type]  # on purpose
    for count in (0, 17):
        with pytest.raises(PassError, match=rf"visual_tokens={count}: expected from 1 to 16, the patches"):
            replace(COVERAGE, visual_tokens=count)(small_graph)
    selected, _ = replace(SEVEN, token_rule="uniform")(small_graph)
    with pytest.raises(PassError, match=r"selected already in front of llm_backbone\.llm\.model\.layers\.2"):
        COVERAGE(selected)


def test_only_rules_that_read_the_attention_need_its_scale(small_graph: fx.GraphModule) -> None:
    unscaled = copy_graph(small_graph)
    decoder_layers(unscaled.graph)[1].attention.kwargs = {}
    for rule in TOKEN_RULES:
        budget = replace(SEVEN, token_rule=rule, merge_tokens=True)
        if rule not in SCORED:
            assert budget(unscaled)[1].changes == 1
            continue
        with pytest.raises(PassError, match=r"layers\.1: expected attention with a literal scale, found scale None"):
            budget(unscaled)
