"""Keep a static budget of visual tokens (EfficientVLA section 3.3), by the paper's rule or another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, Value, add_tensor, inserting
from evla_compile.graph.patch_groups import (
    exclude,
    gather_rows,
    merge_weights,
    similarity,
    spread,
    top,
    unit_rows,
)
from evla_compile.graph.patch_scores import ScoringSite, last_token_attention, relevance
from evla_compile.graph.sites import decoder_layers, input_node, mark_stage
from evla_compile.settings.anatomy import INPUT_IDS
from evla_compile.settings.budgets.tokens import TOKEN_RULES, TokenRule

aten = torch.ops.aten

SCORING_LAYER = 1
"""Position in the kept stack of the layer whose attention scores the patches; the selection follows it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SelectTokens(GraphPass):
    """Keep `visual_tokens` patches from the third kept decoder layer on, lossy.

    Which ones, `token_rule` says. By "relevance", EfficientVLA (arXiv 2506.10100) section 3.3, three groups are kept:

    1. key patches: the `key_tokens` most relevant;
    2. task patches: the floor(task_share (visual_tokens - key_tokens)) most relevant of the others;
    3. diverse patches: of what is left, those that are least like any key patch, until `visual_tokens` are chosen.

    Relevance of patch i, equation 2: r_i = sum over text rows j of the head mean of softmax(q_j k^T)_i in the second
    kept layer, padding rows excluded; query heads that share a key head count each. Diversity of patch i, equation 4:
    1 - max over key patches k of cos(v_i, v_k), on the hidden states that enter the selection.

    The other rules, none of them EfficientVLA's:

    - "coverage": a k-center. First the most relevant patch; then, one after the other, the patch with the largest
      1 - max over chosen k of u_i . u_k, where u_i = (v_i - mean v) / |v_i - mean v| over the patches;
    - "uniform": a fixed grid, see `grid_patches`;
    - "random": patches drawn once, when the policy is compiled, from `token_seed`;
    - "fastv": the patches of most attention in the second kept layer, head mean, by the last real text token alone.
      FastV (arXiv 2403.06764) writes of the attention from all tokens; its public code, which gave its results, ranks
      by the last row, and so does this.

    With `merge_tokens`, a dropped patch joins the kept one with the largest u_i . u_k, and the hidden state of each
    kept patch becomes the mean of its group, itself included: one product with the stage `merge_weights` [B,K,P].

    Under every rule the selection stands behind the second kept layer, so that budgets compare, though "uniform" and
    "random" need nothing of that layer. Kept patches stay in their order, with their original rotary positions. Each
    row of the batch chooses independently; the lower index wins a tie. The scores are computed from q and k beside the
    layer's attention, which stays fused. Refuses fewer than three decoder layers, a budget above the number of patches
    or, by "relevance", below the key tokens, and a second selection.

    Shape legend: B batch, P patches, T text budget, S = P + T sequence, D decoder width, W width of any rows, K patches
    kept or chosen.
    """

    exact: ClassVar[bool] = False

    visual_tokens: int
    """Patches kept (the paper's T), key tokens included."""
    key_tokens: int
    """Patches always kept for their relevance (the paper's K_key), by the rule "relevance"."""
    task_share: float
    """Share of the remaining budget chosen by relevance (the paper's alpha), by the rule "relevance"."""
    token_rule: TokenRule = "relevance"
    """Which patches are kept."""
    token_seed: int = 0
    """Seed of the rule "random"."""
    merge_tokens: bool = False
    """Whether dropped patches are merged into kept ones."""

    def __repr__(self) -> str:
        """Return what the rule reads."""
        of_rule = {"relevance": ("key_tokens", "task_share"), "random": ("token_rule", "token_seed")}
        names = (
            "visual_tokens",
            *of_rule.get(self.token_rule, ("token_rule",)),
            *("merge_tokens",) * self.merge_tokens,
        )
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"

    def __post_init__(self) -> None:
        if self.key_tokens < 1:
            raise ValueError(f"key_tokens={self.key_tokens}: expected a whole number from 1 up")
        if not 0.0 <= self.task_share <= 1.0:
            raise ValueError(f"task_share={self.task_share}: expected a number in [0.0, 1.0]")
        if self.token_rule not in TOKEN_RULES:
            raise ValueError(f"token_rule={self.token_rule!r}: expected one of {', '.join(TOKEN_RULES)}")

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Insert the scores and the gather behind the second layer and rewire the layers that follow."""
        graph = gm.graph
        layers = decoder_layers(graph)
        if len(layers) <= SCORING_LAYER + 1:
            raise PassError(
                f"selecting visual tokens needs {SCORING_LAYER + 1} decoder layers below it and one above, and the"
                f" graph has {len(layers)}: keep more layers, or all visual tokens"
            )
        scoring, following = layers[SCORING_LAYER], layers[SCORING_LAYER + 1 :]
        if following[0].entry is not scoring.exit:
            raise PassError(f"visual tokens are selected already in front of {following[0].path}: select them once")
        patches = int(scoring.exit.meta["val"].shape[1] - input_node(graph, INPUT_IDS).meta["val"].shape[1])
        fewest = self.key_tokens if self.token_rule == "relevance" else 1
        if not fewest <= self.visual_tokens <= patches:
            least = f"key_tokens={self.key_tokens}" if self.token_rule == "relevance" else "1"
            raise PassError(
                f"visual_tokens={self.visual_tokens}: expected from {least} to {patches}, the patches that reach the"
                " decoder"
            )
        if self.visual_tokens == patches:
            return 0
        with inserting(graph, following[0].nodes[0], "select_tokens") as proxy:
            text = aten.sym_size.int(proxy(input_node(graph, INPUT_IDS)), 1)
            site = ScoringSite(scoring, proxy, text, patches)
            kept, weights = self._select(gm, site)
            width = scoring.exit.meta["val"].shape[2]
            moved = {scoring.exit: _shorten(proxy(scoring.exit), kept, site, width, weights).node}
            for table in scoring.rotary_tables:
                rows = aten.expand.default(proxy(table), [site.batch, -1, -1])
                moved[table] = _shorten(rows, kept, site, table.meta["val"].shape[2]).node
            moved[scoring.length] = (text + self.visual_tokens).node
        for layer in following:
            for node in layer.nodes:
                node.args = fx.map_arg(node.args, lambda read: moved.get(read, read))
        return 1

    def _select(self, gm: fx.GraphModule, site: ScoringSite) -> tuple[Value, Value | None]:
        """Return the kept patch indices, ascending, int64 [B,K], and with merging its matrix, float32 [B,K,P]."""
        similar = None
        if self.merge_tokens or self.token_rule == "coverage":
            similar = similarity(site.states(), site.patches, site.numbers)
        kept = mark_stage(self._choose(gm, site, similar), "kept_patches")
        if not self.merge_tokens:
            return kept, None
        weights = merge_weights(similar, kept, self.visual_tokens, site.patches, site.numbers)
        return kept, mark_stage(weights, "merge_weights")

    def _choose(self, gm: fx.GraphModule, site: ScoringSite, similar: Value | None) -> Value:
        """Return the kept patch indices in ascending order, int64 [B,K]; `similar` is there for "coverage"."""
        count = self.visual_tokens
        if self.token_rule == "uniform":
            return _constant(gm, site, grid_patches(site.patches, count))
        if self.token_rule == "random":
            return _constant(gm, site, random_patches(site.patches, count, self.token_seed))
        if self.token_rule == "fastv":
            scores = mark_stage(last_token_attention(site), "relevance")
            return aten.sort.default(top(scores, count), 1)[0]
        scores = mark_stage(relevance(site), "relevance")
        if self.token_rule == "coverage":
            return spread(similar, scores, count, site.patches)
        return self._choose_groups(scores, site)

    def _choose_groups(self, scores: Value, site: ScoringSite) -> Value:
        """Return the key, task and diverse patches in ascending order, int64 [B,K]."""
        states, width = site.states(), site.layer.exit.meta["val"].shape[2]
        # the share as written in decimals: 0.57 * 100 is 56.99... in binary
        task_tokens = math.floor(Fraction(str(self.task_share)) * (self.visual_tokens - self.key_tokens))
        diverse_tokens = self.visual_tokens - self.key_tokens - task_tokens
        key = mark_stage(top(scores, self.key_tokens), "key_patches")  # 1: by relevance
        chosen = [key]
        if task_tokens:  # 2: by relevance, among the others
            chosen.append(mark_stage(top(exclude(scores, chosen), task_tokens), "task_patches"))
        if diverse_tokens:  # 3: by diversity, among what is left
            diversity = exclude(_diversity(states, key, width), chosen)
            chosen.append(mark_stage(top(diversity, diverse_tokens), "diverse_patches"))
        return aten.sort.default(aten.cat.default(chosen, 1), 1)[0]


def grid_patches(patches: int, count: int) -> tuple[int, ...]:
    """Return `count` patches spread evenly over the square grid of `patches`, ascending.

    The grid's side is cut into round(sqrt(count)) bands, over which the patches are dealt as evenly as they go; each is
    the one at the middle of its band and of its share of the band's length, the later one where that is a border.

    Raises:
        PassError: `patches` is no square number.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        raise PassError(f"token_rule='uniform': expected a square grid of patches, found {patches} patches")
    bands = round(math.sqrt(count))  # at most the side, and no band gets more than that
    chosen: list[int] = []
    for band in range(bands):
        row, share = _middle(band, bands, side), (band + 1) * count // bands - band * count // bands
        chosen += [row * side + _middle(place, share, side) for place in range(share)]
    return tuple(chosen)


def random_patches(patches: int, count: int, seed: int) -> tuple[int, ...]:
    """Return the `count` of `patches` to which numpy's PCG64 of a seed deals the least numbers, ascending."""
    draw = np.random.Generator(np.random.PCG64(seed)).random(patches)
    return tuple(sorted(draw.argsort(kind="stable")[:count].tolist()))


def _middle(part: int, parts: int, length: int) -> int:
    """Return which of `length` places is at the middle of the given one of so many equal parts."""
    return (2 * part + 1) * length // (2 * parts)


def _constant(gm: fx.GraphModule, site: ScoringSite, kept: Sequence[int]) -> Value:
    """Return the same indices for every row of the batch, int64 [B,K]."""
    name = add_tensor(gm, "kept_patches", torch.tensor(kept, dtype=torch.int64, device=site.device))
    indices = aten.unsqueeze.default(site.proxy(gm.graph.get_attr(name)), 0)  # [1,K]
    return aten.expand.default(indices, [site.batch, -1])


def _diversity(patches: Value, key: Value, width: int) -> Value:
    """Return 1 - max over key patches of the cosine similarity, float32 [B,P]."""
    unit = unit_rows(aten.to.dtype(patches, torch.float32))  # [B,P,D]
    anchors = gather_rows(unit, key, width)  # [B,K,D]: the key patches
    similarity = aten.matmul.default(unit, aten.transpose.int(anchors, 1, 2))  # [B,P,K]
    return aten.rsub.Scalar(aten.amax.default(similarity, [-1]), 1)  # [B,P]


def _shorten(rows: Value, kept: Value, site: ScoringSite, width: int, weights: Value | None = None) -> Value:
    """Return the sequence [B,K+T,W] of [B,P+T,W]: BOS, the patches that stay, the rest of the text.

    These are the kept ones or, where there are `weights` [B,K,P], weighted sums of all.
    """
    visual = aten.slice.Tensor(rows, 1, 1, site.patches + 1)  # [B,P,W]
    if weights is None:
        visual = gather_rows(visual, kept, width)  # [B,K,W]
    else:
        dtype = site.layer.exit.meta["val"].dtype
        visual = aten.to.dtype(aten.matmul.default(weights, aten.to.dtype(visual, torch.float32)), dtype)  # [B,K,W]
    return aten.cat.default([aten.slice.Tensor(rows, 1, 0, 1), visual, aten.slice.Tensor(rows, 1, 1 - site.text)], 1)
