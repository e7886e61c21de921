"""Make values inside the graph its outputs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.sites import stage_node

SAMPLES = "samples"
"""Name of the finished graph's own output."""


@dataclass(frozen=True, kw_only=True)
class ExposeStages(GraphPass):
    """Return the named stages as a tuple, exact; what none of them needs is removed.

    Stages are values that `capture` and the passes have named: `patches`, `projected`, `layers.0` and so on (what
    leaves each decoder layer, by its index in the checkpoint), `cognition`, after unrolling `denoising.0` and so on
    (the actions after each step), after selection also `relevance`, `key_patches`, `task_patches`, `diverse_patches`
    and `kept_patches`; `samples` is the graph's output. For comparing lowerings stage by stage. Refuses a name that the
    graph does not have, and repeated names.
    """

    exact: ClassVar[bool] = True

    stages: tuple[str, ...]
    """Names, in the order of the new outputs."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the graph's output."""
        if not self.stages or len(set(self.stages)) != len(self.stages):
            raise PassError(f"stages={self.stages}: expected at least one name, each once")
        output = gm.graph.output_node()
        output.args = (
            tuple(output.args[0] if name == SAMPLES else stage_node(gm.graph, name) for name in self.stages),
        )
        return len(self.stages)
