"""Reuse the DiT's features across denoising steps (EfficientVLA section 3.4)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, inserting
from evla_compile.graph.sites import indexed_modules, is_call, residual_ends
from evla_compile.settings.anatomy import COGACT

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class CacheFeatures(GraphPass):
    """Recompute attention and MLP of every DiT block at step % interval == 0 only, lossy; reuse them otherwise.

    EfficientVLA (arXiv 2506.10100) section 3.4, equations 6 to 11: a reused step adds the cached outputs of all blocks
    to its own input. Their sum C = stack output - stack input is one tensor, so there are two kinds of steps:

    1. recomputed (step % interval == 0): the blocks run, and C is cached;
    2. reused: the blocks are removed, and their result is tokens + C with the C of the last recomputed step.

    C covers the tokens that are read behind the blocks: the action tokens alone where the condition token is dropped
    there (it is dead in a reused step), else all of them. Both halves of classifier-free guidance are cached. Refuses a
    graph whose sampler is not unrolled, and one that is cached already.

    Shape legend: G guided batch (2B with guidance, else B), A action steps of a chunk, D width of the action head.
    """

    exact: ClassVar[bool] = False

    interval: int
    """Denoising steps between two recomputations (the paper's N)."""

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: expected a whole number from 1 up")

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the block stack of every reused step by one add."""
        graph = gm.graph
        steps = sorted(indexed_modules(graph, COGACT.denoising))
        if not steps:
            raise PassError("no unrolled denoising step in the graph: run UnrollDiffusion first")
        cached, reused = None, 0
        for step in steps:
            tokens, hidden = _stack_ends(graph, step)
            if step % self.interval == 0:  # 1: recomputed
                with inserting(graph, hidden.next, f"{COGACT.denoising}.{step}") as proxy:
                    cached = aten.sub.Tensor(proxy(hidden), proxy(tokens)).node  # [G,A,D], or [G,1+A,D]
            elif cached is not None:  # 2: reused
                with inserting(graph, hidden, f"{COGACT.denoising}.{step}") as proxy:
                    hidden.replace_all_uses_with(aten.add.Tensor(proxy(tokens), proxy(cached)).node)
                reused += 1
        return reused


def _stack_ends(graph: fx.Graph, step: int) -> tuple[fx.Node, fx.Node]:
    """Return the tokens that enter the blocks of `step` and those that leave them and are read."""
    path = f"{COGACT.denoising}.{step}.{COGACT.action_model}.net.blocks"
    blocks = indexed_modules(graph, path)
    if not blocks:
        raise PassError(f"no DiT block under {path!r}: its features are cached already")
    first, last = min(blocks), max(blocks)
    entry, _ = residual_ends(f"{path}.{first}", blocks[first])
    _, exit_ = residual_ends(f"{path}.{last}", blocks[last])
    joined, readers = entry.all_input_nodes, list(exit_.users)
    if is_call(entry, aten.cat.default) and len(joined) == 2 and len(readers) == 1 and _drops_first_token(readers[0]):
        return joined[1], readers[0]  # [G,A,D] each: the action tokens, without the condition token in front of them
    return entry, exit_  # [G,1+A,D] each


def _drops_first_token(node: fx.Node) -> bool:
    return is_call(node, aten.slice.Tensor) and node.args[1:3] == (1, 1)
