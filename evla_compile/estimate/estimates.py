"""Estimate parameters, operations, bytes and rooflines of a policy without its weights: everything on meta tensors.

The numbers are counted on graphs from `capture` and the passes. `estimates` runs them on the whole policy: a minute at
full size. `quick_estimates` runs them on a policy with one block of every kind, and multiplies the counts of each block
by the number of such blocks: the same numbers in seconds.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

import torch
from tokenizers import Tokenizer, models, processors
from torch import fx

from evla_compile.compiler.pipeline import build_passes
from evla_compile.estimate.devices import DEVICES, Device
from evla_compile.estimate.footprint import Footprint, footprint, footprint_by_component
from evla_compile.families.cogact.capture import capture, capture_upstream
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.contract import GraphPass, PassReport
from evla_compile.graph.flops import Component, component_of
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import indexed_modules, nodes_under
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.processor import Processor
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import stand_in_plan
from evla_compile.settings.sizes import ModelSizes

Rewritten: TypeAlias = tuple[str, fx.GraphModule, tuple[PassReport, ...]]
"""Name of a configuration, its finished graph, and the reports of its passes."""

_SHORT_LAYERS, _TYPICAL_LAYER = 5, 3
"""Decoder layers of the shortest stack with one that no rewrite treats on its own, and the index of that one: scores
are taken from layer 1, tokens selected in front of 2, and 4 is the last."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """Weights and operations of a policy for one call, by component."""

    dtype: str
    """Dtype of vision and language, "bfloat16" or "float32"; the action head is always float32."""
    vision: Footprint
    """Towers and projector."""
    language: Footprint
    """Decoder and the selection of visual tokens; upstream's language head."""
    action: Footprint
    """The whole denoising loop."""
    passes: tuple[PassReport, ...] = ()
    """What each pass did, in order; empty where the policy was not rewritten as a whole."""

    @property
    def components(self) -> dict[Component, Footprint]:
        """The components by name, in data-flow order."""
        return {"vision": self.vision, "language": self.language, "action": self.action}

    @property
    def total(self) -> Footprint:
        """The sum of the components."""
        return self.vision + self.language + self.action

    def fits(self, device: Device) -> bool:
        """Tell whether the weights fit into the memory of `device`; activations need memory too."""
        return self.total.weight_bytes <= device.memory_bytes

    def roofline_seconds(self, device: Device) -> float:
        """Return a lower bound of the time of one call on `device`: weights read once, activations free.

        It is the sum of the components' bounds: each waits for the one before it, and no cache holds its weights.
        """
        return sum(
            device.roofline_seconds(
                flops=each.flops, weight_bytes=each.read_bytes, dtype="float32" if component == "action" else self.dtype
            )
            for component, each in self.components.items()
        )

    def to_json(self) -> dict[str, Any]:
        """Return the estimate as JSON-ready values, with the total, and the roofline of every device that it fits."""
        bounds = {name: self.roofline_seconds(device) for name, device in DEVICES.items() if self.fits(device)}
        return asdict(self) | {"total": asdict(self.total), "roofline_seconds": bounds}


@own_torch_state()
def skeleton(sizes: ModelSizes, *, dtype: torch.dtype = torch.bfloat16) -> CogACT:
    """Return a policy without weights, on the meta device, in the dtypes of `load`: the action head float32.

    Its tokenizer has no words: the policy is for capturing and counting, never for running.

    Raises:
        ValueError: `dtype` is neither torch.float32 nor torch.bfloat16.
    """
    tokenizer = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1}, "<unk>"))
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    processor = Processor(tokenizer_json=tokenizer.to_str(), statistics={}, image_side=sizes.image_side, pad_id=0)
    with torch.device("meta"):
        policy = CogACT(sizes, processor)
    _cast(policy, dtype)
    return policy.eval().requires_grad_(False)


def estimate(sizes: ModelSizes, config: CompileConfig, *, dtype: torch.dtype = torch.bfloat16) -> Estimate:
    """Return the estimate of a policy of these sizes, compiled by a configuration; see `estimates`."""
    return estimates(sizes, {"": config}, dtype=dtype)[""]


@own_torch_state()
def estimates(
    sizes: ModelSizes, configs: Mapping[str, CompileConfig], *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Estimate]:
    """Return the estimates of a policy of these sizes, compiled by several configurations, by name.

    Captures are shared, and so are passes that several configurations begin with. Operators are counted on the meta
    device, where export copies the attention output of each decoder layer; on a CPU it omits this copy.

    Args:
        sizes: sizes of the dense policy.
        configs: configurations by name.
        dtype: torch.float32 or torch.bfloat16, of vision and language.

    Raises:
        ValueError: a budget does not fit the sizes, or `dtype` is another.
    """
    found = {
        name: _estimate(dtype, footprint_by_component(gm), reports)
        for name, gm, reports in _rewrite(sizes, configs, dtype)
    }
    return {name: found[name] for name in configs}


@own_torch_state()
def quick_estimates(
    sizes: ModelSizes, configs: Mapping[str, CompileConfig], *, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Estimate]:
    """Return `estimates` without the reports of passes, counted on a policy with one block of every kind.

    All blocks of a vision tower are alike, and so are those of the action head and most decoder layers.

    Args:
        sizes: sizes of the dense policy.
        configs: configurations by name.
        dtype: torch.float32 or torch.bfloat16, of vision and language.

    Raises:
        ValueError: a budget does not fit the sizes, or `dtype` is another.
    """
    short, shortened, kept = _shortened(sizes), {}, {}
    for name, config in configs.items():
        kept[name] = config.kept_layer_count(sizes)
        shortened[name] = replace(config.resolve(sizes), keep_layers=min(kept[name], short.language.layers))
    found = {
        name: _estimate(dtype, _extended(gm, short, sizes, kept[name]))
        for name, gm, _ in _rewrite(short, shortened, dtype)
    }
    return {name: found[name] for name in configs}


@own_torch_state()
def estimate_upstream(sizes: ModelSizes, config: CompileConfig, *, dtype: torch.dtype = torch.bfloat16) -> Estimate:
    """Return the estimate of the policy as upstream runs it, counted on one block of every kind.

    Its weights are the whole checkpoint, unused ones included.

    Args:
        sizes: sizes of the policy.
        config: its batch size, text tokens, denoising steps and guidance scale are used; its budgets are not.
        dtype: torch.float32 or torch.bfloat16, of the weights of vision and language; counted as if computed in it.

    Raises:
        ValueError: `dtype` is another.
    """
    short = _shortened(sizes)
    with torch.device("meta"):
        whole, policy = UpstreamCogACT(sizes), UpstreamCogACT(short)
    for model in (whole, policy):
        _cast(model, dtype)
    gm = capture_upstream(policy.eval().requires_grad_(False), config)
    components = _extended(gm, short, sizes, sizes.language.layers)
    for component, counted in components.items():
        stored = [tensor for name, tensor in whole.state_dict().items() if component_of(name) == component]
        parameters, weight_bytes = sum(t.numel() for t in stored), sum(t.nbytes for t in stored)
        components[component] = replace(counted, parameters=parameters, weight_bytes=weight_bytes)
    return _estimate(dtype, components)


def _estimate(
    dtype: torch.dtype, components: Mapping[Component, Footprint], passes: tuple[PassReport, ...] = ()
) -> Estimate:
    name = str(dtype).removeprefix("torch.")
    return Estimate(
        dtype=name,
        vision=components["vision"],
        language=components["language"],
        action=components["action"],
        passes=passes,
    )


def _cast(model: CogACT | UpstreamCogACT, dtype: torch.dtype) -> None:
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: expected torch.float32 or torch.bfloat16")
    for name, module in model.named_children():
        if name != COGACT.action_model:
            module.to(dtype)


def _rewrite(sizes: ModelSizes, configs: Mapping[str, CompileConfig], dtype: torch.dtype) -> Iterator[Rewritten]:
    """Yield the finished graph of every configuration; those with the same first passes follow each other."""
    pipelines: dict[tuple[int, int, float], dict[str, tuple[GraphPass, ...]]] = {}
    for name, config in configs.items():
        captured = (config.batch_size, config.text_tokens, config.cfg_scale)
        pipelines.setdefault(captured, {})[name] = build_passes(config, stand_in_plan(sizes, config), sizes)
    policy = skeleton(sizes, dtype=dtype)
    for alike in pipelines.values():
        yield from _branches(capture(policy, configs[next(iter(alike))]), (), alike)


def _branches(
    gm: fx.GraphModule, reports: tuple[PassReport, ...], pipelines: Mapping[str, tuple[GraphPass, ...]]
) -> Iterator[Rewritten]:
    """Yield the result of each pipeline on `gm`; a pass that several begin with runs once."""
    following: dict[GraphPass, dict[str, tuple[GraphPass, ...]]] = {}
    for name, passes in pipelines.items():
        if passes:
            following.setdefault(passes[0], {})[name] = passes[1:]
        else:
            yield name, gm, reports
    for rewrite, rest in following.items():
        rewritten, behind = run_passes(gm, (rewrite,), earlier=reports)
        yield from _branches(rewritten, behind, rest)


def _shortened(sizes: ModelSizes) -> ModelSizes:
    """Return the sizes of the policy with one block of every kind."""
    return replace(
        sizes,
        dino=replace(sizes.dino, depth=min(2, sizes.dino.depth)),  # one more than is built, or than upstream uses
        siglip=replace(sizes.siglip, depth=min(2, sizes.siglip.depth)),
        language=replace(sizes.language, layers=min(_SHORT_LAYERS, sizes.language.layers)),
        action=replace(sizes.action, depth=1),
    )


def _extended(gm: fx.GraphModule, short: ModelSizes, sizes: ModelSizes, layers: int) -> dict[Component, Footprint]:
    """Return the footprint of a graph of the sizes `short` as if its stacks had the depths of `sizes` and `layers`."""
    missing: list[tuple[Component, int, list[str]]] = [
        ("vision", sizes.dino.depth - short.dino.depth, [f"{COGACT.vision}.dino_featurizer.blocks.0"]),
        ("vision", sizes.siglip.depth - short.siglip.depth, [f"{COGACT.vision}.siglip_featurizer.blocks.0"]),
        ("language", layers - short.language.layers, [f"{COGACT.decoder_layers}.{_TYPICAL_LAYER}"]),
        (
            "action",
            sizes.action.depth - short.action.depth,
            [
                f"{COGACT.denoising}.{step}.{COGACT.action_model}.net.blocks.0"
                for step in indexed_modules(gm.graph, COGACT.denoising)
            ],
        ),
    ]
    components = footprint_by_component(gm)
    for component, times, paths in missing:
        if times > 0:  # fewer layers than the short policy's were pruned from it for real
            block = [node for path in paths for node in nodes_under(gm.graph, path)]
            components[component] += footprint(gm, block) * times
    return components
