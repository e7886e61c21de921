"""A rewrite of your own: one frozen dataclass that takes a graph and returns it rewritten.

    python examples/custom_pass.py

The base class copies the graph, removes dead nodes, propagates shapes, lints and measures; `rewrite` changes nodes and
says how many.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

import evla_compile as evla
from evla_compile.demo.shipped_policy import DEMO_POLICY
from evla_compile.errors import PassError
from evla_compile.families.cogact.capture import capture
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.sites import is_call, module_path

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class ReplaceActivation(GraphPass):
    """Replace the exact GELU of the modules under `path` by its tanh approximation, lossy."""

    exact: ClassVar[bool] = False

    path: str
    """Module path below which activations are replaced, for instance "projector"."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Change the activations in place; their shapes and dtypes stay."""
        found = [
            node
            for node in gm.graph.nodes
            if is_call(node, aten.gelu.default) and module_path(node).startswith(self.path)
        ]
        if not found:
            raise PassError(f"path={self.path!r}: the graph has no GELU there")
        for node in found:
            node.kwargs = {"approximate": "tanh"}
        return len(found)


def main() -> None:
    """Apply the pass to the demo policy's graph and print what it did."""
    policy = evla.load(DEMO_POLICY)
    graph = capture(policy, evla.CompileConfig.dense())
    rewritten, report = ReplaceActivation(path="projector")(graph)
    print(f"{report.name}: {report.changes} changes, {report.before.ops} -> {report.after.ops} operators")

    example = [
        torch.zeros(node.meta["val"].shape if i != 1 else (1, 8), dtype=node.meta["val"].dtype)
        for i, node in enumerate(graph.graph.find_nodes(op="placeholder"))
    ]
    example[2] = torch.tensor([8])
    with torch.no_grad():
        apart = (rewritten(*example) - graph(*example)).abs().max()
    print(f"largest change of a predicted noise: {apart:.1e}")


if __name__ == "__main__":
    main()
