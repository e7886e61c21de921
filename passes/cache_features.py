"""Reuse the DiT's features across denoising steps (EfficientVLA section 3.4)."""

from dataclasses import dataclass
from itertools import pairwise
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
    """Compute attention and MLP of every DiT block at some denoising steps only, lossy; reuse them at the others.

    EfficientVLA (arXiv 2506.10100) section 3.4, equations 6 to 11: a reused step adds the cached outputs of all blocks
    to its own input. Their sum C = stack output - stack input is one tensor, so there are three kinds of steps, where i
    is the last computed step in front of step k, and j the last but one:

    1. computed: the blocks run, and C_k is cached;
    2. reused: the blocks are removed, and their result is tokens + C_i;
    3. extrapolated, not in the paper: their result is tokens + C_k, C_k = C_i + (C_i - C_j) (k - i) / (i - j); all
       steps up to the next computed one share the difference. Without a step j, this is case 2.

    The paper computes the steps 0, N, 2 N, and so on. C covers the tokens that are read behind the blocks: the action
    tokens alone where the condition token is dropped there (it is dead in a reused step), else all of them. Both halves
    of classifier-free guidance are cached. Refuses a graph whose sampler is not unrolled, one that is cached already,
    and steps that the sampler does not have.

    Shape legend: G guided batch (2B with guidance, else B), A action steps of a chunk, D width of the action head.
    """

    exact: ClassVar[bool] = False

    steps: tuple[int, ...]
    """Denoising steps that compute, ascending; the first is 0."""
    extrapolate: bool = False
    """Whether reused steps extrapolate from the last two computed ones."""

    def __post_init__(self) -> None:
        if self.steps[:1] != (0,) or any(first >= second for first, second in pairwise(self.steps)):
            raise ValueError(f"steps={self.steps}: expected ascending denoising steps from 0, such as (0, 3, 7)")

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the block stack of every reused step by one add."""
        graph = gm.graph
        steps = sorted(indexed_modules(graph, COGACT.denoising))
        if not steps:
            raise PassError("no unrolled denoising step in the graph: run UnrollDiffusion first")
        missing = sorted(set(self.steps) - set(steps))
        if missing:
            raise PassError(f"steps={self.steps}: the sampler has no steps {missing}; it has {steps[0]} to {steps[-1]}")
        cached: _Cached | None = None
        for step in steps:
            tokens, hidden = _stack_ends(graph, step)
            if step in self.steps:  # 1: computed
                cached = _cache(graph, step, tokens, hidden, cached if self.extrapolate else None)
            elif cached is not None:
                with inserting(graph, hidden, f"{COGACT.denoising}.{step}") as proxy:
                    features = proxy(cached.features)  # 2: reused
                    if cached.difference is not None:  # 3: extrapolated
                        ahead = (step - cached.step) / cached.distance
                        features = aten.add.Tensor(features, aten.mul.Tensor(proxy(cached.difference), ahead))
                    hidden.replace_all_uses_with(aten.add.Tensor(proxy(tokens), features).node)
        return len(steps) - len(self.steps)


@dataclass(frozen=True, slots=True)
class _Cached:
    """What a computed step i leaves for those behind it, [G,A,D] or [G,1+A,D] each."""

    step: int
    """i."""
    features: fx.Node
    """C_i."""
    difference: fx.Node | None = None
    """C_i - C_j; None where nothing is extrapolated."""
    distance: int = 0
    """i - j, where there is a difference."""


def _cache(graph: fx.Graph, step: int, tokens: fx.Node, hidden: fx.Node, earlier: _Cached | None) -> _Cached:
    """Write the features of a computed step behind its blocks, and their difference from those of an earlier one."""
    with inserting(graph, hidden.next, f"{COGACT.denoising}.{step}") as proxy:
        features = aten.sub.Tensor(proxy(hidden), proxy(tokens))
        if earlier is None:
            return _Cached(step, features.node)
        difference = aten.sub.Tensor(features, proxy(earlier.features))
    return _Cached(step, features.node, difference.node, step - earlier.step)


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
