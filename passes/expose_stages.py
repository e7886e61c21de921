"""Return named values of the graph as its outputs."""

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.sites import stage_node
from evla_compile.settings.anatomy import SAMPLES


@dataclass(frozen=True, kw_only=True)
class ExposeStages(GraphPass):
    """Return the named stages as a tuple, exact; nodes that none of them needs are removed.

    Stages are values that `capture` and the passes have named, so that lowerings can be compared stage by stage:

    - `patches` [B,P,D_vision] and `projected` [B,P,D];
    - `layers.0` and so on: the hidden states behind each decoder layer, by its index in the checkpoint, [B,S,D];
    - `cognition` [B,1,D];
    - `denoising.0` and so on, once unrolled: the actions after each step, [B,A,F];
    - once visual tokens are selected, the indices `kept_patches`, int64 [B,K]; of rules that score patches, `relevance`
      [B,P]; of the paper's rule, `key_patches`, `task_patches` and `diverse_patches`, int64 [B,K]; with merging,
      `merge_weights` [B,K,P];
    - `samples` [B,A,F], the output of the graph itself.

    Refuses a name that the graph does not have, and repeated names.
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
