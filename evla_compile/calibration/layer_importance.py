"""Importance of decoder layers: how far each turns what enters it (EfficientVLA's equation 1)."""

from typing import Any

from torch import Tensor, fx
from torch.nn import functional

from evla_compile.graph.sites import decoder_layers


def mean_cosine(before: Tensor, after: Tensor) -> Tensor:
    """Return the mean over positions of the cosine between states [B,S,D] in front of a layer and behind it, [B]."""
    return functional.cosine_similarity(before.float(), after.float(), dim=-1).mean(dim=-1)


class LayerObserver(fx.Interpreter):
    """Runs a graph with decoder layers, and measures the importance of each layer over all runs.

    Attributes:
        positions: which positions of the sequence are compared; the paper's score takes all.
    """

    def __init__(self, graph: fx.GraphModule, positions: slice = slice(None)) -> None:
        super().__init__(graph)
        self.positions = positions
        layers = decoder_layers(graph.graph)
        self._first = layers[0].entry
        self._exits = {layer.exit: place for place, layer in enumerate(layers)}
        self._cosines: list[list[float]] = [[] for _ in layers]
        self._hidden: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and measure it where it ends a layer."""
        result = super().run_node(n)
        if n is self._first:
            self._hidden = result
        elif n in self._exits and self._hidden is not None:
            before, after = (states[:, self.positions] for states in (self._hidden, result))  # [B,S,D]
            self._cosines[self._exits[n]].append(mean_cosine(before, after).mean().item())
            self._hidden = result
        return result

    def importance(self) -> tuple[float, ...]:
        """Return 1 - the mean cosine of every layer's input and output, in their order."""
        return tuple(1.0 - sum(values) / len(values) for values in self._cosines)
