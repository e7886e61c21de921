"""Keep a static budget of visual tokens (EfficientVLA section 3.3), by the paper's rule or another."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, Value, add_tensor, inserting
from evla_compile.graph.sites import decoder_layers, input_node, mark_stage
from evla_compile.graph.token_scores import (
    centred_similarity,
    diversity,
    draw,
    exclude,
    gather_rows,
    grid,
    merge_weights,
    relevance,
    spread,
    top,
)
from evla_compile.settings.anatomy import INPUT_IDS
from evla_compile.settings.budgets.tokens import TokenRule

aten = torch.ops.aten

SCORING_LAYER = 1
"""Position in the kept stack of the layer whose attention scores the patches; the selection follows it."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SelectTokens(GraphPass):
    """Keep `visual_tokens` patches from the third kept decoder layer on, lossy.

    Which ones, `rule` says:

    - "relevance", EfficientVLA (arXiv 2506.10100) section 3.3, in three groups:
      1. key patches: the `key_tokens` most relevant;
      2. task patches: the floor(task_share (visual_tokens - key_tokens)) most relevant of the others;
      3. diverse patches: of what is left, those that are least like any key patch, until `visual_tokens` are chosen;
    - "coverage", k-center: the most relevant patch, then always the one that is least like any chosen one;
    - "fastv" (arXiv 2403.06764, as its public code does it): those that the last token attends to most;
    - "uniform", a fixed grid, and "random", a fixed draw by `seed`: baselines that look at nothing.

    Relevance of patch i, the paper's equation 2: r_i = sum over text rows j of the head mean of softmax(q_j k^T)_i in
    the second kept layer, padding rows excluded. Likeness is the cosine of hidden states that enter the selection, with
    "relevance" as they are (equation 4), with "coverage" and `merge` after their mean over the patches is taken away.

    With `merge`, every patch that goes joins the kept one that it is most like, and each kept hidden state becomes the
    mean of its group: one matrix product, its matrix the stage `merge_weights`, float32 [B,K,P].

    Kept patches stay in their order, with their original rotary positions. Each row of the batch chooses independently;
    the lower index wins a tie. The scores are computed from q and k beside the layer's attention, which stays fused.
    Refuses fewer than three decoder layers, a budget above the number of patches or below the key tokens, and a second
    selection.

    Shape legend: B batch, P patches, T text budget, S = P + T sequence, D decoder width, K patches kept.
    """

    exact: ClassVar[bool] = False

    visual_tokens: int
    """Patches kept (the paper's T), key tokens included."""
    key_tokens: int
    """Patches always kept for their relevance (the paper's K_key); of "relevance" alone."""
    task_share: float
    """Share of the remaining budget chosen by relevance (the paper's alpha); of "relevance" alone."""
    rule: TokenRule = "relevance"
    """Which patches stay."""
    merge: bool = False
    """Whether the patches that go are averaged into those that stay."""
    seed: int = 0
    """Decides the draw of "random"."""

    def __repr__(self) -> str:
        shown = [f"{name}={getattr(self, name)!r}" for name in ("visual_tokens", "key_tokens", "task_share")]
        others = {"rule": "relevance", "merge": False, "seed": 0}
        shown += [f"{name}={getattr(self, name)!r}" for name, usual in others.items() if getattr(self, name) != usual]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __post_init__(self) -> None:
        if self.key_tokens < 1:
            raise ValueError(f"key_tokens={self.key_tokens}: expected a whole number from 1 up")
        if not 0.0 <= self.task_share <= 1.0:
            raise ValueError(f"task_share={self.task_share}: expected a number in [0.0, 1.0]")

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
        if not self.key_tokens <= self.visual_tokens <= patches:
            raise PassError(
                f"visual_tokens={self.visual_tokens}: expected from key_tokens={self.key_tokens} to {patches}, the"
                " patches that reach the decoder"
            )
        if self.visual_tokens == patches:
            return 0
        batch, _, width = scoring.exit.meta["val"].shape
        device = scoring.exit.meta["val"].device
        with inserting(graph, following[0].nodes[0], "select_tokens") as proxy:
            text = aten.sym_size.int(proxy(input_node(graph, INPUT_IDS)), 1)
            states = aten.slice.Tensor(proxy(scoring.exit), 1, 1, patches + 1)  # [B,P,D]
            similarity = None
            if self.merge or self.rule == "coverage":
                similarity = centred_similarity(states, device)  # [B,P,P]
            if self.rule in ("uniform", "random"):
                fixed = grid if self.rule == "uniform" else lambda count, of: draw(count, of, self.seed)
                places = torch.tensor([fixed(self.visual_tokens, patches)], device=device)  # [1,K]
                constant = proxy(graph.get_attr(add_tensor(gm, "select_tokens.places", places)))
                kept = mark_stage(aten.expand.default(constant, [batch, -1]), "kept_patches")
            else:
                rows: Literal["text", "last"] = "last" if self.rule == "fastv" else "text"
                scores = relevance(scoring, proxy, text, patches, rows)
                kept = self._choose(scores, states, similarity, patches=patches, width=width)
            visual = gather_rows(states, kept, width)  # [B,K,D]
            if similarity is not None and self.merge:
                groups = merge_weights(similarity, kept, patches, device)
                means = aten.matmul.default(mark_stage(groups, "merge_weights"), aten.to.dtype(states, torch.float32))
                visual = aten.to.dtype(means, scoring.exit.meta["val"].dtype)
            moved = {scoring.exit: _between(proxy(scoring.exit), visual, text).node}
            for table in scoring.rotary_tables:
                all_rows = aten.expand.default(proxy(table), [batch, -1, -1])
                of_patches = aten.slice.Tensor(all_rows, 1, 1, patches + 1)
                moved[table] = _between(all_rows, gather_rows(of_patches, kept, table.meta["val"].shape[2]), text).node
            moved[scoring.length] = (text + self.visual_tokens).node
        for layer in following:
            for node in layer.nodes:
                node.args = fx.map_arg(node.args, lambda read: moved.get(read, read))
        return 1

    def _choose(self, scores: Value, states: Value, similarity: Value | None, *, patches: int, width: int) -> Value:
        """Return the kept patch indices in ascending order, int64 [B,K]."""
        if similarity is not None and self.rule == "coverage":
            together = spread(similarity, top(scores, 1), self.visual_tokens, patches)
        elif self.rule == "fastv":
            together = top(scores, self.visual_tokens)
        else:
            together = self._by_relevance(scores, states, width)
        return mark_stage(aten.sort.default(together, 1)[0], "kept_patches")

    def _by_relevance(self, scores: Value, states: Value, width: int) -> Value:
        """Return the patch indices of the paper's three groups, int64 [B,K]."""
        # the share as written in decimals: 0.57 * 100 is 56.99... in binary
        task_tokens = math.floor(Fraction(str(self.task_share)) * (self.visual_tokens - self.key_tokens))
        diverse_tokens = self.visual_tokens - self.key_tokens - task_tokens
        key = mark_stage(top(scores, self.key_tokens), "key_patches")  # 1: by relevance
        chosen = [key]
        if task_tokens:  # 2: by relevance, among the others
            chosen.append(mark_stage(top(exclude(scores, chosen), task_tokens), "task_patches"))
        if diverse_tokens:  # 3: by diversity, among what is left
            unlike = exclude(diversity(states, key, width), chosen)
            chosen.append(mark_stage(top(unlike, diverse_tokens), "diverse_patches"))
        return aten.cat.default(chosen, 1)


def _between(rows: Value, visual: Value, text: Value) -> Value:
    """Return the sequence [B,K+T,W]: BOS of [B,S,W], visual rows [B,K,W], the rest of the text."""
    return aten.cat.default([aten.slice.Tensor(rows, 1, 0, 1), visual, aten.slice.Tensor(rows, 1, 1 - text)], 1)
