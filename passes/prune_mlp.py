"""Cut the width of the decoder's MLPs (EfficientVLA section 4.1, Table 5)."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, get_tensor, replace_tensor
from evla_compile.graph.deferred import cut
from evla_compile.graph.sites import DecoderLayer, decoder_layers


@dataclass(frozen=True, kw_only=True)
class PruneMLP(GraphPass):
    """Keep some intermediate neurons of each decoder MLP, lossy: gate and up rows, down columns, one index set.

    EfficientVLA (implementation details of section 4.1, the "MLP" column of Table 5) chooses the neurons by PruneNet's
    learned policy; here the plan names them, measured without training by `evla_compile.calibration`. Of M neurons K
    stay: gate and up projection [M,D] -> [K,D], down projection [D,M] -> [D,K]. The cut weights are deferred: computed
    when read, then freed. Refuses layers that the graph does not have, and indices that do not ascend or fit.
    """

    exact: ClassVar[bool] = False

    neurons: tuple[tuple[int, tuple[int, ...]], ...] = field(repr=False)
    """Pairs of a layer index and the ascending indices of its neurons that stay."""

    def __repr__(self) -> str:
        widths = sorted({len(kept) for _, kept in self.neurons})
        return f"PruneMLP(layers={len(self.neurons)}, neurons={widths[0] if len(widths) == 1 else widths})"

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Slice the three weights of every named layer."""
        layers = {layer.index: layer for layer in decoder_layers(gm.graph)}
        missing = sorted(index for index, _ in self.neurons if index not in layers)
        if missing:
            raise PassError(f"no decoder layers {missing} in the graph; it has {sorted(layers)}")
        return sum(_slice(gm, layers[index], kept) for index, kept in self.neurons)


def _slice(gm: fx.GraphModule, layer: DecoderLayer, kept: tuple[int, ...]) -> int:
    """Cut one layer's three weights to the neurons `kept`; return 1, or 0 where all stay."""
    names = [_weight_name(layer, f"mlp.{part}_proj") for part in ("gate", "up", "down")]
    gate, up, down = (get_tensor(gm, name) for name in names)
    width = gate.shape[0]
    ascending = all(a < b for a, b in pairwise(kept))
    if not kept or not ascending or kept[0] < 0 or kept[-1] >= width:
        raise PassError(f"decoder layer {layer.index}: neurons must ascend within 0..{width - 1}, at least one")
    if len(kept) == width:
        return 0
    index = torch.tensor(kept)
    for name, tensor, axis in zip(names, (gate, up, down), (0, 0, 1), strict=True):
        replace_tensor(gm, name, cut(tensor, axis, index))
    return 1


def _weight_name(layer: DecoderLayer, suffix: str) -> str:
    """Return the name of the weight of a layer's linear submodule, which nothing else may read."""
    weight = layer.named(suffix).args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr" or len(weight.users) != 1:
        raise PassError(f"decoder layer {layer.index}: the weight of {suffix} is not a tensor of its own")
    return str(weight.target)
