"""Score patches by how much the text attends to them in one decoder layer, beside its fused attention.

Shape legend: B batch, H query heads, G key heads, P patches, T text budget, J = T - 1 text rows behind the image,
S = P + T sequence, E head width, D decoder width.
"""

from dataclasses import dataclass
from typing import Any

import torch

from evla_compile.errors import PassError
from evla_compile.graph.contract import Value, Wrap
from evla_compile.graph.sites import DecoderLayer, argument, input_node
from evla_compile.settings.anatomy import TEXT_LENGTH

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class ScoringSite:
    """Where patches are scored and selected: behind one decoder layer."""

    layer: DecoderLayer
    """The layer."""
    proxy: Wrap
    """Turns a node of the graph into a proxy."""
    text: Value
    """Proxy of the text budget T, an integer."""
    patches: int
    """Patches in the sequence."""

    @property
    def batch(self) -> int:
        """Rows of the batch."""
        return int(self.layer.exit.meta["val"].shape[0])

    @property
    def device(self) -> torch.device:
        """Device of the hidden states."""
        device: torch.device = self.layer.exit.meta["val"].device
        return device

    def states(self) -> Value:
        """Return the hidden states of the patches behind the layer, [B,P,D]."""
        return aten.slice.Tensor(self.proxy(self.layer.exit), 1, 1, self.patches + 1)

    def numbers(self, count: int) -> Value:
        """Return the numbers from 0 up to `count`, int64 [count], as a node: no proxy would make it one."""
        options: dict[str, Any] = {"dtype": torch.int64, "device": self.device}
        return self.proxy(self.layer.exit.graph.call_function(aten.arange.default, (count,), options))


def relevance(site: ScoringSite) -> Value:
    """Return r_i = sum over real text rows j behind the image of the head mean of softmax(q_j k^T)_i, float32 [B,P].

    EfficientVLA (arXiv 2506.10100) equation 2.

    Raises:
        PassError: the attention's scale is no literal.
    """
    graph = site.layer.exit.graph
    query, key, scale = _operands(site)
    rows = aten.slice.Tensor(query, 2, 1 - site.text)  # [B,H,J,E] of [B,H,S,E]: all text behind the image
    logits = aten.mul.Tensor(aten.matmul.default(rows, aten.transpose.int(key, 2, 3)), scale)  # [B,H,J,S]
    position = aten.arange.default(site.text - 1, dtype=torch.int64, device=site.device)  # [J], from the image's end
    column = aten.arange.default(site.text + site.patches, dtype=torch.int64, device=site.device)  # [S]
    later = aten.gt.Tensor(column, aten.unsqueeze.default(aten.add.Tensor(position, site.patches + 1), 1))  # [J,S]
    logits = aten.masked_fill.Scalar(logits, later, -torch.inf)  # [B,H,J,S]: attention is causal
    attention = aten.mean.dim(aten.softmax.int(logits, -1, torch.float32), [1])  # [B,J,S]: mean over heads
    visible = aten.slice.Tensor(attention, 2, 1, site.patches + 1)  # [B,J,P]: the columns of the patches, behind BOS
    real_rows = aten.sub.Tensor(site.proxy(input_node(graph, TEXT_LENGTH)), 1)  # [B]
    padding = aten.ge.Tensor(position, aten.unsqueeze.default(real_rows, 1))  # [B,J]
    visible = aten.masked_fill.Scalar(visible, aten.unsqueeze.default(padding, 2), 0.0)  # [B,J,P]
    return aten.sum.dim_IntList(visible, [1])  # [B,P]


def last_token_attention(site: ScoringSite) -> Value:
    """Return the head mean of softmax(q_j k^T)_i with j the last real text row alone, float32 [B,P].

    FastV (arXiv 2403.06764) as its public code ranks image tokens (pkunlp-icler/FastV, `modeling_llama.py`:
    `torch.mean(last_layer_attention, dim=1)[0][-1]` of the layer in front of the cut).

    Raises:
        PassError: the attention's scale is no literal.
    """
    query, key, scale = _operands(site)
    heads, width = (site.layer.attention.meta["val"].shape[axis] for axis in (1, 3))
    length = site.proxy(input_node(site.layer.exit.graph, TEXT_LENGTH))  # [B], BOS included
    rows = aten.slice.Tensor(query, 2, 1 - site.text)  # [B,H,J,E] of [B,H,S,E]
    last = _behind(aten.sub.Tensor(length, 2), 3)  # [B,1,1,1]
    row = aten.gather.default(rows, 2, aten.expand.default(last, [-1, heads, -1, width]))  # [B,H,1,E]
    logits = aten.mul.Tensor(aten.matmul.default(row, aten.transpose.int(key, 2, 3)), scale)  # [B,H,1,S]
    column = aten.arange.default(site.text + site.patches, dtype=torch.int64, device=site.device)  # [S]
    later = aten.ge.Tensor(column, _behind(aten.add.Tensor(length, site.patches), 3))  # [B,1,1,S]: padding
    logits = aten.masked_fill.Scalar(logits, later, -torch.inf)  # [B,H,1,S]
    attention = aten.mean.dim(aten.softmax.int(logits, -1, torch.float32), [1])  # [B,1,S]
    return aten.squeeze.dim(aten.slice.Tensor(attention, 2, 1, site.patches + 1), 1)  # [B,P]


def _behind(value: Value, axes: int) -> Value:
    """Return [B,1,...] of [B], with so many axes behind the first."""
    for axis in range(1, axes + 1):
        value = aten.unsqueeze.default(value, axis)
    return value


def _operands(site: ScoringSite) -> tuple[Value, Value, float]:
    """Return the layer's queries [B,H,S,E], the key of every query head [B,H,S,E], and the factor of their products.

    Query heads that share a key head each get a copy of it, so that scores are defined per query head.

    Raises:
        PassError: the factor is no literal.
    """
    query, key = (argument(site.layer.attention, index) for index in (0, 1))
    scale = site.layer.attention.kwargs.get("scale")
    if not isinstance(scale, float):
        raise PassError(f"{site.layer.path}: expected attention with a literal scale, found scale {scale}")
    heads, groups = (node.meta["val"].shape[1] for node in (query, key))
    keys = site.proxy(key)
    if groups != heads:
        keys = aten.expand.default(aten.unsqueeze.default(keys, 2), [-1, -1, heads // groups, -1, -1])  # [B,G,H/G,S,E]
        keys = aten.flatten.using_ints(keys, 1, 2)  # [B,H,S,E]
    return site.proxy(query), keys, scale
