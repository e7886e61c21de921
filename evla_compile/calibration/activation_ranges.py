"""The largest activations of every layer that could be computed in half precision."""

import math
from collections.abc import Callable, Mapping
from functools import partial

from torch import Tensor, fx

from evla_compile.errors import CalibrationError
from evla_compile.graph.sites import module_path
from evla_compile.passes.lower_precision import float_operands, lowered_sites


class ActivationRanges:
    """Records them while a graph runs."""

    def __init__(self, graph: fx.Graph) -> None:
        self._sites = list(lowered_sites(graph))
        read = [value for site in self._sites for value in float_operands(site) if value.op != "get_attr"]
        self._largest: dict[fx.Node, float] = dict.fromkeys([*self._sites, *read], 0.0)

    def watch(self) -> dict[fx.Node, Callable[[Tensor], None]]:
        """Return what is to be called with the value of each node."""
        return {node: partial(self._see, node) for node in self._largest}

    def found(self) -> dict[str, float]:
        """Return the largest absolute input or output of every layer that could be lowered, by its module path."""
        found: dict[str, float] = {}
        for site in self._sites:
            values = [self._largest[node] for node in (site, *float_operands(site)) if node in self._largest]
            found[module_path(site)] = max(found.get(module_path(site), 0.0), *values)
        return found

    def state(self) -> dict[str, float]:
        """Return what was seen so far, by the nodes' names."""
        return {node.name: value for node, value in self._largest.items()}

    def restore(self, state: Mapping[str, float]) -> None:
        """Go on from what an earlier run had seen of the same graph."""
        for node in self._largest:
            self._largest[node] = state[node.name]

    def _see(self, node: fx.Node, value: Tensor) -> None:
        largest = value.abs().max().item()
        if not math.isfinite(largest):
            raise CalibrationError(
                f"{module_path(node) or node.name} yields {largest} on a calibration frame, so nothing can be measured:"
                " the checkpoint is damaged, or was loaded in a dtype that it overflows"
            )
        self._largest[node] = max(self._largest[node], largest)
