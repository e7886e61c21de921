"""Compute a ReLU in the MLP of some decoder layers, in place of a SiLU."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.sites import decoder_layers, is_call

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class RectifyMLP(GraphPass):
    """Replace silu(x) by max(x, 0) in the gated MLPs of some decoder layers, lossy.

    Refuses layers that the graph does not have.
    """

    exact: ClassVar[bool] = False

    layers: tuple[int, ...]
    """Indices of the layers."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Change the activations in place; shapes and dtypes stay."""
        found = {layer.index: layer for layer in decoder_layers(gm.graph)}
        missing = sorted(set(self.layers) - found.keys())
        if missing:
            raise PassError(f"layers={self.layers}: the graph has no decoder layers {missing}; it has {sorted(found)}")
        activations = [node for index in self.layers for node in found[index].nodes if is_call(node, aten.silu.default)]
        for node in activations:
            node.target = aten.relu.default
        return len(activations)
