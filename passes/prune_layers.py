"""Delete redundant decoder layers (EfficientVLA section 3.2)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.sites import decoder_layers


@dataclass(frozen=True, kw_only=True)
class PruneLayers(GraphPass):
    """Delete every decoder layer that is not in `keep`, lossy: x^(l+1) = x^(l) for a deleted layer l, x [B,S,D].

    EfficientVLA (arXiv 2506.10100) section 3.2.2, equation 1; which layers go is measured by
    `evla_compile.calibration`. Layers need not be contiguous, and those that stay keep their indices in module paths.
    Refuses indices that the graph does not have.
    """

    exact: ClassVar[bool] = False

    keep: tuple[int, ...]
    """Indices of the layers that stay."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Let the layer that follows a deleted one read what entered it."""
        layers = decoder_layers(gm.graph)
        present = [layer.index for layer in layers]
        if not self.keep or not set(self.keep) <= set(present):
            raise PassError(f"keep={self.keep}: expected at least one of the graph's decoder layers {present}")
        removed = [layer for layer in layers if layer.index not in self.keep]
        for layer in reversed(removed):
            layer.exit.replace_all_uses_with(layer.entry)
        return len(removed)
