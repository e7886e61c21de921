"""Keep a static budget of visual tokens (EfficientVLA section 3.3)."""

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, Value, Wrap, inserting
from evla_compile.graph.sites import DecoderLayer, argument, decoder_layers, input_node, mark_stage
from evla_compile.settings.anatomy import INPUT_IDS, TEXT_LENGTH

aten = torch.ops.aten

SCORING_LAYER = 1
"""Position in the kept stack of the layer whose attention scores the patches; the selection follows it."""


@dataclass(frozen=True, kw_only=True)
class SelectTokens(GraphPass):
    """Keep `visual_tokens` patches from the third kept decoder layer on, lossy.

    EfficientVLA (arXiv 2506.10100) section 3.3. Three groups of patches are kept:

    1. key patches: the `key_tokens` most relevant;
    2. task patches: the floor(task_share (visual_tokens - key_tokens)) most relevant of the others;
    3. diverse patches: of what is left, those that are least like any key patch, until `visual_tokens` are chosen.

    Relevance of patch i, equation 2: r_i = sum over text rows j of the head mean of softmax(q_j k^T)_i in the second
    kept layer, padding rows excluded. Diversity of patch i, equation 4: 1 - max over key patches k of cos(v_i, v_k), on
    the hidden states that enter the selection.

    Kept patches stay in their order, with their original rotary positions. Each row of the batch chooses independently;
    the lower index wins a tie. The scores are computed from q and k beside the layer's attention, which stays fused.
    Refuses fewer than three decoder layers, a budget above the number of patches or below the key tokens, and a second
    selection.

    Shape legend: B batch, H heads, P patches, T text budget, J = T - 1 text rows behind the image, S = P + T sequence,
    E head width, D decoder width, W width of any rows, K patches kept or chosen.
    """

    exact: ClassVar[bool] = False

    visual_tokens: int
    """Patches kept (the paper's T), key tokens included."""
    key_tokens: int
    """Patches always kept for their relevance (the paper's K_key)."""
    task_share: float
    """Share of the remaining budget chosen by relevance (the paper's alpha)."""

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
        with inserting(graph, following[0].nodes[0], "select_tokens") as proxy:
            text = aten.sym_size.int(proxy(input_node(graph, INPUT_IDS)), 1)
            relevance = _relevance(scoring, proxy, text, patches)
            kept = self._choose(relevance, aten.slice.Tensor(proxy(scoring.exit), 1, 1, patches + 1), width)
            moved = {scoring.exit: _keep(proxy(scoring.exit), kept, text, patches, width).node}
            for table in scoring.rotary_tables:
                rows = aten.expand.default(proxy(table), [batch, -1, -1])
                moved[table] = _keep(rows, kept, text, patches, table.meta["val"].shape[2]).node
            moved[scoring.length] = (text + self.visual_tokens).node
        for layer in following:
            for node in layer.nodes:
                node.args = fx.map_arg(node.args, lambda read: moved.get(read, read))
        return 1

    def _choose(self, relevance: Value, patches: Value, width: int) -> Value:
        """Return the kept patch indices in ascending order, int64 [B,K]."""
        # the share as written in decimals: 0.57 * 100 is 56.99... in binary
        task_tokens = math.floor(Fraction(str(self.task_share)) * (self.visual_tokens - self.key_tokens))
        diverse_tokens = self.visual_tokens - self.key_tokens - task_tokens
        key = mark_stage(_top(relevance, self.key_tokens), "key_patches")  # 1: by relevance
        chosen = [key]
        if task_tokens:  # 2: by relevance, among the others
            chosen.append(mark_stage(_top(_exclude(relevance, chosen), task_tokens), "task_patches"))
        if diverse_tokens:  # 3: by diversity, among what is left
            diversity = _exclude(_diversity(patches, key, width), chosen)
            chosen.append(mark_stage(_top(diversity, diverse_tokens), "diverse_patches"))
        together = aten.cat.default(chosen, 1)
        return mark_stage(aten.sort.default(together, 1)[0], "kept_patches")


def _relevance(layer: DecoderLayer, proxy: Wrap, text: Value, patches: int) -> Value:
    """Return the relevance of every patch, float32 [B,P]."""
    graph = layer.exit.graph
    query, key, scale = proxy(argument(layer.attention, 0)), proxy(argument(layer.attention, 1)), _scale(layer)
    rows = aten.slice.Tensor(query, 2, 1 - text)  # [B,H,J,E] of [B,H,S,E]: all text behind the image
    logits = aten.mul.Tensor(aten.matmul.default(rows, aten.transpose.int(key, 2, 3)), scale)  # [B,H,J,S]
    device = layer.exit.meta["val"].device
    position = aten.arange.default(text - 1, dtype=torch.int64, device=device)  # [J], counted from the image's end
    column = aten.arange.default(text + patches, dtype=torch.int64, device=device)  # [S]
    later = aten.gt.Tensor(column, aten.unsqueeze.default(aten.add.Tensor(position, patches + 1), 1))  # [J,S]
    logits = aten.masked_fill.Scalar(logits, later, -torch.inf)  # [B,H,J,S]: attention is causal
    attention = aten.mean.dim(aten.softmax.int(logits, -1, torch.float32), [1])  # [B,J,S]: mean over heads
    visible = aten.slice.Tensor(attention, 2, 1, patches + 1)  # [B,J,P]: the columns of the patches, behind BOS
    real_rows = aten.sub.Tensor(proxy(input_node(graph, TEXT_LENGTH)), 1)  # [B]
    padding = aten.ge.Tensor(position, aten.unsqueeze.default(real_rows, 1))  # [B,J]
    visible = aten.masked_fill.Scalar(visible, aten.unsqueeze.default(padding, 2), 0.0)  # [B,J,P]
    return mark_stage(aten.sum.dim_IntList(visible, [1]), "relevance")  # [B,P]


def _diversity(patches: Value, key: Value, width: int) -> Value:
    """Return 1 - max over key patches of the cosine similarity, float32 [B,P]."""
    states = aten.to.dtype(patches, torch.float32)  # [B,P,D]
    norm = aten.clamp_min.default(aten.linalg_vector_norm.default(states, 2, [-1], True), 1e-12)  # [B,P,1]
    unit = aten.div.Tensor(states, norm)  # [B,P,D]
    anchors = _gather(unit, key, width)  # [B,K,D]: the key patches
    similarity = aten.matmul.default(unit, aten.transpose.int(anchors, 1, 2))  # [B,P,K]
    return aten.rsub.Scalar(aten.amax.default(similarity, [-1]), 1)  # [B,P]


def _top(scores: Value, count: int) -> Value:
    """Return the indices of the `count` highest scores, the lower index first among equals, int64 [B,count]."""
    ranking = aten.sort.stable(scores, stable=True, dim=1, descending=True)[1]  # [B,P]
    return aten.slice.Tensor(ranking, 1, 0, count)  # [B,count]


def _exclude(scores: Value, chosen: list[Value]) -> Value:
    """Return the scores [B,P] with -inf at the patches that each of `chosen`, int64 [B,K], names."""
    for indices in chosen:
        scores = aten.scatter.value(scores, 1, indices, -torch.inf)
    return scores


def _gather(rows: Value, indices: Value, width: int) -> Value:
    """Return the rows [B,K,W] of [B,P,W] that int64 [B,K] names."""
    return aten.gather.default(rows, 1, aten.expand.default(aten.unsqueeze.default(indices, 2), [-1, -1, width]))


def _keep(rows: Value, kept: Value, text: Value, patches: int, width: int) -> Value:
    """Return the sequence [B,K+T,W] of [B,P+T,W]: BOS, the kept patches, the rest of the text."""
    visual = _gather(aten.slice.Tensor(rows, 1, 1, patches + 1), kept, width)  # [B,K,W] of [B,P,W]
    return aten.cat.default([aten.slice.Tensor(rows, 1, 0, 1), visual, aten.slice.Tensor(rows, 1, 1 - text)], 1)


def _scale(layer: DecoderLayer) -> float:
    """Return the factor of q k^T in the layer's attention.

    Raises:
        PassError: it is not a literal, or queries and keys have different numbers of heads.
    """
    scale = layer.attention.kwargs.get("scale")
    query, key = (argument(layer.attention, index).meta["val"].shape for index in (0, 1))
    if not isinstance(scale, float) or query[1] != key[1]:
        raise PassError(
            f"{layer.path}: expected attention with a literal scale and as many key as query heads, found scale {scale}"
            f" and {query[1]} against {key[1]} heads"
        )
    return scale
