"""Count parameters and operations of CogACT after the rewrites, on graphs captured without weights."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, TypeAlias, get_args

import torch
from torch import fx

from benchmarks.paper.published import setting
from evla_compile.compiler.pipeline import build_passes
from evla_compile.estimate.estimates import skeleton
from evla_compile.families.cogact.capture import capture, capture_upstream
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.contract import GraphPass, weights
from evla_compile.graph.flops import Component, component_of, flops_by_component, graph_flops
from evla_compile.graph.run_passes import run_passes
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import stand_in_plan
from evla_compile.settings.sizes import ModelSizes, PublishedName

Progress: TypeAlias = Callable[[str], None]
"""Function that prints a line about the progress."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Counts:
    """Parameters and operations of a policy, by component."""

    parameters: Mapping[Component, int]
    """Parameters of the checkpoint, less those that the rewrites removed."""
    flops: Mapping[Component, int]
    """Operations of one call, `paper` convention."""


class Counter:
    """Counts upstream's policy after the lossy rewrites of configurations; every graph is captured once.

    Attributes:
        sizes: sizes of the policies by name.
    """

    def __init__(self, sizes: Mapping[PublishedName, ModelSizes], progress: Progress) -> None:
        self.sizes = sizes
        self._progress = progress
        self._policies: dict[PublishedName, UpstreamCogACT] = {}
        self._graphs: dict[tuple[object, ...], fx.GraphModule] = {}

    def count(self, size: PublishedName, config: CompileConfig) -> Counts:
        """Return the counts of the policy of one size after the rewrites of one configuration."""
        sizes, dense = self.sizes[size], self.graph(size, config.ddim_steps)
        passes = build_passes(config, stand_in_plan(sizes, config), sizes)
        graph = self.graph(size, config.ddim_steps, tuple(rewrite for rewrite in passes if not rewrite.exact))
        state = self._policies[size].state_dict()
        parameters: dict[Component, int] = dict.fromkeys(get_args(Component), 0)
        for tensors, sign in ((state.items(), 1), (weights(dense), -1), (weights(graph), 1)):
            for name, tensor in tensors:
                if name in state:
                    parameters[component_of(name)] += sign * tensor.numel()
        return Counts(parameters=parameters, flops=flops_by_component(graph, "paper"))

    def graph(self, size: PublishedName, ddim_steps: int, passes: tuple[GraphPass, ...] = ()) -> fx.GraphModule:
        """Return the graph of upstream's policy of one size, rewritten by `passes`."""
        key = (size, ddim_steps, *passes)
        if key not in self._graphs:
            if passes:
                before = self.graph(size, ddim_steps, passes[:-1])
                self._progress(f"CogACT-{size}: {' '.join(type(rewrite).__name__ for rewrite in passes)}")
                self._graphs[key], _ = run_passes(before, passes[-1:])
            else:
                self._progress(f"CogACT-{size}: capturing it as upstream runs it, denoising steps: {ddim_steps}")
                with torch.device("meta"):
                    policy = UpstreamCogACT(self.sizes[size])
                self._policies[size] = policy.eval().requires_grad_(False)
                self._graphs[key] = capture_upstream(policy, replace(setting(), ddim_steps=ddim_steps))
        return self._graphs[key]


@dataclass(frozen=True, kw_only=True)
class KeepOutputs(GraphPass):
    """Keep some of a graph's outputs, exact; what only the others need is removed."""

    exact: ClassVar[bool] = True

    outputs: tuple[int, ...]
    """Positions of the outputs that stay."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the graph's outputs."""
        output = gm.graph.output_node()
        results = output.all_input_nodes
        output.args = (tuple(results[position] for position in self.outputs),)
        return len(results) - len(self.outputs)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """The policy after one more rewrite."""

    name: str
    """The rewrite."""
    paper: int
    """Operations of one call, `paper` convention."""
    all: int
    """Operations of one call, `all` convention."""


def exact_steps(counter: Counter, config: CompileConfig, progress: Progress) -> tuple[Step, ...]:
    """Count CogACT-Base rewrite by rewrite, from how upstream runs it to how it is compiled."""
    sizes, upstream = counter.sizes["base"], counter.graph("base", config.ddim_steps)
    steps = [_step("upstream", upstream)]
    for name, outputs in (("no lm_head", (0, 2, 3)), ("no last ViT blocks", (0,))):
        steps.append(_step(name, KeepOutputs(outputs=outputs)(upstream)[0]))
    progress("compiling: capture")
    graph = capture(skeleton(sizes, dtype=torch.float32), config)
    passes = build_passes(config, stand_in_plan(sizes, config), sizes)

    def announced() -> Iterator[GraphPass]:
        for rewrite in passes:
            progress(f"compiling: {type(rewrite).__name__}")
            yield rewrite

    _, reports = run_passes(graph, announced())
    names = ("embedders only where inputs differ", *(type(rewrite).__name__ for rewrite in passes[1:]))
    steps += [
        Step(name=name, paper=report.after.paper_flops, all=report.after.flops)
        for name, report in zip(names, reports, strict=True)
    ]
    return tuple(steps)


def _step(name: str, gm: fx.GraphModule) -> Step:
    return Step(name=name, paper=graph_flops(gm.graph.nodes, "paper"), all=graph_flops(gm.graph.nodes, "all"))
