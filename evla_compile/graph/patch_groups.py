"""Choose and merge patches by how alike their hidden states are; all shapes static, the lower index wins every tie.

Shape legend: B batch, P patches, D decoder width, W width of any rows, K patches kept.
"""

from collections.abc import Callable
from typing import TypeAlias

import torch

from evla_compile.graph.contract import Value

aten = torch.ops.aten

Numbers: TypeAlias = Callable[[int], Value]
"""Writes the numbers from 0 up to a count, int64."""

_ITSELF = 2.0
"""Similarity of a patch with itself: above every cosine, so that rounding never parts a patch from itself."""


def unit_rows(states: Value) -> Value:
    """Return float32 states [B,P,D] divided by their norms."""
    norm = aten.clamp_min.default(aten.linalg_vector_norm.default(states, 2, [-1], True), 1e-12)  # [B,P,1]
    return aten.div.Tensor(states, norm)  # [B,P,D]


def similarity(states: Value, patches: int, numbers: Numbers) -> Value:
    """Return the cosines u_i . u_j of states [B,P,D] centred over the patches, float32 [B,P,P].

    u_i = (v_i - mean v) / |v_i - mean v|; the diagonal is `_ITSELF`.
    """
    states = aten.to.dtype(states, torch.float32)  # [B,P,D]
    unit = unit_rows(aten.sub.Tensor(states, aten.mean.dim(states, [1], True)))  # [B,P,D]
    cosines = aten.matmul.default(unit, aten.transpose.int(unit, 1, 2))  # [B,P,P]
    patch = numbers(patches)  # [P]
    return aten.masked_fill.Scalar(cosines, aten.eq.Tensor(patch, aten.unsqueeze.default(patch, 1)), _ITSELF)


def spread(similar: Value, scores: Value, count: int, patches: int) -> Value:
    """Return a k-center of the patches in ascending order, int64 [B,K].

    The first is that of the highest score; then, K - 1 times, that which is least like its nearest chosen one:
    argmax_i (1 - max over chosen k of u_i . u_k).

    Args:
        similar: similarity [B,P,P].
        scores: scores [B,P].
        count: patches to choose, K.
        patches: P.
    """

    def likeness(chosen: Value) -> Value:  # [B,1,1] -> [B,1,P], whatever B is when the graph runs
        return aten.gather.default(similar, 1, aten.expand.default(chosen, [-1, -1, patches]))

    first = aten.argmax.default(scores, 1, True)  # [B,1]
    nearest = likeness(aten.unsqueeze.default(first, 2))  # [B,1,P]: similarity with the nearest chosen patch
    for _ in range(count - 1):
        nearest = aten.maximum.default(nearest, likeness(aten.argmin.default(nearest, 2, True)))
    # chosen patches alone have `_ITSELF` there, and equals keep their order
    return top(aten.squeeze.dim(nearest, 1), count)


def merge_weights(similar: Value, kept: Value, count: int, patches: int, numbers: Numbers) -> Value:
    """Return the matrix that replaces each kept patch by the mean of its group, float32 [B,K,P]; its rows sum to 1.

    A group is a kept patch with the dropped ones that are most like it among all kept ones.

    Args:
        similar: similarity [B,P,P].
        kept: indices of the kept patches, int64 [B,K].
        count: K.
        patches: P.
        numbers: writes whole numbers.
    """
    group = aten.argmax.default(gather_rows(similar, kept, patches), 1)  # [B,P] of [B,K,P]
    number = aten.unsqueeze.default(numbers(count), 1)  # [K,1]
    member = aten.to.dtype(aten.eq.Tensor(aten.unsqueeze.default(group, 1), number), torch.float32)  # [B,K,P]
    return aten.div.Tensor(member, aten.sum.dim_IntList(member, [2], True))


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
