"""Cut a policy's graph into its three components, and count their costs: FLOPs and weights read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import fx

from benchmarks.latency.rows import DtypeName
from evla_compile.estimate.devices import Device
from evla_compile.families.cogact.capture import capture_upstream
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.contract import copy_graph, get_tensor, remove_dead_nodes
from evla_compile.graph.flops import Component, flops_by_component, graph_flops
from evla_compile.graph.sites import is_call, stage_node
from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.settings.sizes import ModelSizes

aten = torch.ops.aten

COMPONENTS: tuple[Component, ...] = ("vision", "language", "action")
"""The components, in the order in which they run: towers and projector, decoder, denoising loop."""
CUTS = ("projected", "cognition")
"""The stages that pass from one component to the next."""

_GROUPS: Mapping[str, Component] = MappingProxyType(
    {"vision_backbone": "vision", "projector": "vision", "llm_backbone": "language", "action_model": "action"}
)

ComponentGraphs: TypeAlias = tuple[fx.GraphModule, ...]
"""A graph's components; each takes the inputs of the whole graph, and then what the component before it returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """Cost of one call of a graph, on any backend."""

    flops: int
    """Floating-point operations, everything executed."""
    read_bytes: int
    """Bytes of the weights that are read whole: without embedding tables, of which few rows are read."""


def cut(gm: fx.GraphModule) -> ComponentGraphs:
    """Return the components of a graph, which share its weights; run one after the other they are the graph.

    Raises:
        PassError: the graph lacks a stage at which it is cut.
    """
    return tuple(_between(gm, entry, exit_) for entry, exit_ in zip((None, *CUTS), (*CUTS, None), strict=True))


def costs_of(components: ComponentGraphs) -> dict[Component, Cost]:
    """Return what each component costs, by name."""
    return {
        name: Cost(flops=graph_flops(component.graph.nodes), read_bytes=sum(_read_weights(component).values()))
        for name, component in zip(COMPONENTS, components, strict=True)
    }


def upstream_costs(sizes: ModelSizes, dtype: DtypeName) -> dict[Component, Cost]:
    """Return what each component of the policy as upstream runs it costs, by name, counted without weights.

    Args:
        sizes: sizes of the policy.
        dtype: dtype of the weights, the action head's excepted.
    """
    gm = _upstream_graph(sizes)
    read = dict.fromkeys(COMPONENTS, 0)
    for name, stored in _read_weights(gm).items():
        component = _GROUPS[name.partition(".")[0]]
        read[component] += stored if component == "action" else stored * getattr(torch, dtype).itemsize // 4
    flops = flops_by_component(gm)
    return {name: Cost(flops=flops[name], read_bytes=read[name]) for name in COMPONENTS}


def bound_seconds(costs: Mapping[Component, Cost], device: Device, dtype: DtypeName) -> float:
    """Return the least time that a call can take on a device: its components run in turn, so bounds add up.

    Args:
        costs: by component.
        device: what computes.
        dtype: dtype of the components, except the action head, which is float32.
    """
    return sum(
        device.roofline_seconds(
            flops=cost.flops, weight_bytes=cost.read_bytes, dtype="float32" if name == "action" else dtype
        )
        for name, cost in costs.items()
    )


@cache
def _upstream_graph(sizes: ModelSizes) -> fx.GraphModule:
    with torch.device("meta"):
        return capture_upstream(UpstreamCogACT(sizes), CompileConfig.dense(text_tokens=PAPER_TEXT_TOKENS))


def _between(gm: fx.GraphModule, entry: str | None, exit_: str | None) -> fx.GraphModule:
    component = copy_graph(gm)
    if exit_ is not None:
        component.graph.output_node().args = (stage_node(component.graph, exit_),)
    if entry is not None:
        handed = stage_node(component.graph, entry)
        with component.graph.inserting_after(component.graph.find_nodes(op="placeholder")[-1]):
            placeholder = component.graph.placeholder(entry)
        placeholder.meta["val"] = handed.meta["val"]
        handed.replace_all_uses_with(placeholder)
    remove_dead_nodes(component.graph)
    return copy_graph(component)  # has only the weights that this component reads


def _read_weights(gm: fx.GraphModule) -> dict[str, int]:
    """Return the bytes of each tensor that the graph reads whole, by name."""
    names = {
        str(node.target)
        for node in gm.graph.find_nodes(op="get_attr")
        if not all(is_call(user, aten.embedding.default) for user in node.users)
    }
    tensors = {name: get_tensor(gm, name) for name in sorted(names)}
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}
