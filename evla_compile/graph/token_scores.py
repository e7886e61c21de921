"""Scores, choices and groups of visual tokens, written as nodes of a graph; `SelectTokens` puts them together.

Shape legend: B batch, H heads, P patches, T text budget, J = T - 1 text rows behind the image, S = P + T sequence,
E head width, D decoder width, W width of any rows, K patches chosen.
"""

import math
import random
from typing import Literal

import torch

from evla_compile.errors import PassError
from evla_compile.graph.contract import Value, Wrap
from evla_compile.graph.sites import DecoderLayer, argument, input_node, mark_stage
from evla_compile.settings.anatomy import TEXT_LENGTH

aten = torch.ops.aten


def relevance(
    layer: DecoderLayer, proxy: Wrap, text: Value, patches: int, rows: Literal["text", "last"] = "text"
) -> Value:
    """Return the attention that every patch receives in a layer, float32 [B,P].

    Args:
        layer: the layer.
        proxy: turns its nodes into proxies.
        text: T.
        patches: P.
        rows: whose attention is added up: that of all text behind the image, or of the last token alone.
    """
    graph = layer.exit.graph
    query, key, scale = proxy(argument(layer.attention, 0)), _repeated_keys(layer, proxy), _scale(layer)
    asking = aten.slice.Tensor(query, 2, 1 - text)  # [B,H,J,E] of [B,H,S,E]: all text behind the image
    logits = aten.mul.Tensor(aten.matmul.default(asking, aten.transpose.int(key, 2, 3)), scale)  # [B,H,J,S]
    device = layer.exit.meta["val"].device
    position = aten.arange.default(text - 1, dtype=torch.int64, device=device)  # [J], counted from the image's end
    column = aten.arange.default(text + patches, dtype=torch.int64, device=device)  # [S]
    later = aten.gt.Tensor(column, aten.unsqueeze.default(aten.add.Tensor(position, patches + 1), 1))  # [J,S]
    logits = aten.masked_fill.Scalar(logits, later, -torch.inf)  # [B,H,J,S]: attention is causal
    attention = aten.mean.dim(aten.softmax.int(logits, -1, torch.float32), [1])  # [B,J,S]: mean over heads
    visible = aten.slice.Tensor(attention, 2, 1, patches + 1)  # [B,J,P]: the columns of the patches, behind BOS
    real_rows = aten.sub.Tensor(proxy(input_node(graph, TEXT_LENGTH)), 1)  # [B]
    last = aten.unsqueeze.default(real_rows, 1)  # [B,1]
    padding = aten.ge.Tensor(position, last)  # [B,J]
    if rows == "last":
        padding = aten.ne.Tensor(position, aten.sub.Tensor(last, 1))
    visible = aten.masked_fill.Scalar(visible, aten.unsqueeze.default(padding, 2), 0.0)  # [B,J,P]
    return mark_stage(aten.sum.dim_IntList(visible, [1]), "relevance")  # [B,P]


def diversity(patches: Value, key: Value, width: int) -> Value:
    """Return 1 - max over key patches of the cosine similarity, float32 [B,P]."""
    states = aten.to.dtype(patches, torch.float32)  # [B,P,D]
    norm = aten.clamp_min.default(aten.linalg_vector_norm.default(states, 2, [-1], True), 1e-12)  # [B,P,1]
    unit = aten.div.Tensor(states, norm)  # [B,P,D]
    anchors = gather_rows(unit, key, width)  # [B,K,D]: the key patches
    similarity = aten.matmul.default(unit, aten.transpose.int(anchors, 1, 2))  # [B,P,K]
    return aten.rsub.Scalar(aten.amax.default(similarity, [-1]), 1)  # [B,P]


def top(scores: Value, count: int) -> Value:
    """Return the indices of the `count` highest scores, the lower index first among equals, int64 [B,count]."""
    ranking = aten.sort.stable(scores, stable=True, dim=1, descending=True)[1]  # [B,P]
    return aten.slice.Tensor(ranking, 1, 0, count)  # [B,count]


def exclude(scores: Value, chosen: list[Value]) -> Value:
    """Return the scores [B,P] with -inf at the patches that each of `chosen`, int64 [B,K], names."""
    for indices in chosen:
        scores = aten.scatter.value(scores, 1, indices, -torch.inf)
    return scores


def gather_rows(rows: Value, indices: Value, width: int) -> Value:
    """Return the rows [B,K,W] of [B,P,W] that int64 [B,K] names."""
    return aten.gather.default(rows, 1, aten.expand.default(aten.unsqueeze.default(indices, 2), [-1, -1, width]))


def centred_similarity(patches: Value, device: torch.device) -> Value:
    """Return the cosines of all pairs of patches, their mean taken away first, float32 [B,P,P]; 1 more on the diagonal.

    So every patch is most like itself, whatever is rounded and however many patches are equal.
    """
    states = aten.to.dtype(patches, torch.float32)  # [B,P,D]
    centred = aten.sub.Tensor(states, aten.mean.dim(states, [1], True))  # [B,P,D]
    norm = aten.clamp_min.default(aten.linalg_vector_norm.default(centred, 2, [-1], True), 1e-12)  # [B,P,1]
    unit = aten.div.Tensor(centred, norm)  # [B,P,D]
    place = _numbers(patches, device)  # [P]
    itself = aten.to.dtype(aten.eq.Tensor(place, aten.unsqueeze.default(place, 1)), torch.float32)  # [P,P]
    return aten.add.Tensor(aten.matmul.default(unit, aten.transpose.int(unit, 1, 2)), itself)


def spread(similarity: Value, first: Value, count: int, patches: int) -> Value:
    """Return patches that cover the others (k-center), int64 [B,K]: `first`, then always the one least like any chosen.

    Args:
        similarity: float32 [B,P,P], above all else on the diagonal.
        first: the first patch, int64 [B,1].
        count: K.
        patches: P.
    """
    chosen = [aten.unsqueeze.default(first, 2)]  # [B,1,1]
    closest: Value | None = None
    for _ in range(count - 1):
        row = aten.gather.default(similarity, 1, aten.expand.default(chosen[-1], [-1, -1, patches]))  # [B,1,P]
        closest = row if closest is None else aten.maximum.default(closest, row)  # to the chosen one most like it
        chosen.append(aten.argmin.default(closest, 2, True))  # [B,1,1]: the lower index among equals
    return aten.squeeze.dim(aten.cat.default(chosen, 1), 2)


def merge_weights(similarity: Value, kept: Value, patches: int, device: torch.device) -> Value:
    """Return what turns all patches into groups' means, float32 [B,K,P]: each patch joins the kept one most like it.

    Args:
        similarity: float32 [B,P,P], above all else on the diagonal.
        kept: the kept patches in ascending order, int64 [B,K]; the first among equals gets a patch.
        patches: P.
        device: where the graph runs.
    """
    rows = gather_rows(similarity, kept, patches)  # [B,K,P]
    group = aten.argmax.default(rows, 1, True)  # [B,1,P]
    number = aten.unsqueeze.default(_numbers(kept, device), 1)  # [K,1]
    member = aten.to.dtype(aten.eq.Tensor(group, number), torch.float32)  # [B,K,P]
    return aten.div.Tensor(member, aten.sum.dim_IntList(member, [2], True))


def _numbers(rows: Value, device: torch.device) -> Value:
    """Return 0, 1, ... for every place along axis 1 of `rows`, int64."""
    return aten.arange.default(aten.sym_size.int(rows, 1), dtype=torch.int64, device=device)


def grid(count: int, patches: int) -> list[int]:
    """Return `count` patches that are spread evenly over the image, ascending.

    Of a square image they stand in about sqrt(count) rows, each with the same number of patches or one more, in the
    middle of equal parts of the row; other patches are taken at equal distances.
    """
    side = math.isqrt(patches)
    if side * side != patches:
        return [patches * (2 * place + 1) // (2 * count) for place in range(count)]
    rows = max(round(math.sqrt(count)), -(-count // side))
    found = []
    for row in range(rows):
        columns = count * (row + 1) // rows - count * row // rows
        top_edge = side * (2 * row + 1) // (2 * rows) * side
        found += [top_edge + side * (2 * column + 1) // (2 * columns) for column in range(columns)]
    return found


def draw(count: int, patches: int, seed: int) -> list[int]:
    """Return `count` patches drawn at random, ascending; the same ones for the same seed."""
    return sorted(random.Random(seed).sample(range(patches), count))  # noqa: S311  # no secret


def _repeated_keys(layer: DecoderLayer, proxy: Wrap) -> Value:
    """Return the keys of the layer's attention for every query head, [B,H,S,E]: grouped ones are repeated.

    Raises:
        PassError: the number of query heads is no multiple of that of key heads.
    """
    node = argument(layer.attention, 1)
    heads, groups = (int(argument(layer.attention, index).meta["val"].shape[1]) for index in (0, 1))
    if heads % groups:
        raise PassError(f"{layer.path}: {heads} query heads for {groups} key heads: expected a multiple")
    if heads == groups:
        return proxy(node)
    width = int(node.meta["val"].shape[3])
    grouped = aten.expand.default(aten.unsqueeze.default(proxy(node), 2), [-1, -1, heads // groups, -1, -1])
    return aten.reshape.default(grouped, [node.meta["val"].shape[0], heads, -1, width])


def _scale(layer: DecoderLayer) -> float:
    """Return the factor of q k^T in the layer's attention.

    Raises:
        PassError: it is not a literal.
    """
    scale = layer.attention.kwargs.get("scale")
    if not isinstance(scale, float):
        raise PassError(f"{layer.path}: expected attention with a literal scale, found {scale}")
    return scale
