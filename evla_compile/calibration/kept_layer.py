"""A kept decoder layer as the repair sees it: where its regressions read, and what a position counts in them.

Shape legend: S positions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import get_tensor
from evla_compile.graph.deferred import materialized
from evla_compile.graph.sites import DecoderLayer, argument, is_call

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class RowWeights:
    """Weights of the positions in the regressions."""

    visual: float
    """Of visual tokens."""
    text: float
    """Of text."""
    cognition: float
    """Of the cognition token."""

    def of(self, positions: int, text: int) -> Tensor:
        """Return the weight of every position of a sequence: BOS, the visual tokens, the rest of the text; [S]."""
        weights = torch.full((positions,), self.text, dtype=torch.float64)
        weights[1 : 1 + positions - text] = self.visual
        weights[-1] = self.cognition
        return weights


class KeptLayer:
    """A kept layer of the compressed graph: where its regressions read and what they replace."""

    def __init__(self, gm: fx.GraphModule, layer: DecoderLayer) -> None:
        self.layer = layer
        self.output, self.down = layer.named("self_attn.o_proj"), layer.named("mlp.down_proj")
        self.context, self.neurons = argument(self.output, 0), argument(self.down, 0)
        sums = [node for node in layer.nodes if is_call(node, aten.add.Tensor) and self.output in node.args]
        if len(sums) != 1:
            raise PassError(f"{layer.path}: expected one residual add behind the attention, found {len(sums)}")
        (self.attended,) = sums
        self._gm = gm

    @property
    def stops(self) -> tuple[fx.Node, ...]:
        """Nodes that the walk is divided at."""
        return self.context, self.attended, self.neurons, self.layer.exit

    def weight(self, projection: fx.Node) -> Tensor:
        """Return a weight as the policy has it, deferred ones computed."""
        return materialized(get_tensor(self._gm, str(argument(projection, 1).target)))
