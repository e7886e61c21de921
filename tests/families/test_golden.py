"""The golden cases through the captured and rewritten graphs; the ONNX side is in test_export."""

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, fx

from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import is_call, nodes_under, stage_node
from evla_compile.passes import (
    CacheFeatures,
    FoldConstants,
    NarrowLastLayer,
    PruneLayers,
    SelectTokens,
    SpecializeShapes,
    UnrollDiffusion,
)
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.tolerances import TOLERANCES, check

aten = torch.ops.aten
Arrays = dict[str, NDArray[Any]]
NodeValues = Callable[[fx.GraphModule, Sequence[Tensor]], dict[fx.Node, Any]]
PATCH_SETS = {"key": "key_patches", "task": "task_patches", "diverse": "diverse_patches", "keep": "kept_patches"}


@pytest.fixture(scope="module")
def sampler(tiny_policy: CogACT, captured: fx.GraphModule) -> Callable[[float, int], fx.GraphModule]:
    """The captured golden policy, unrolled, by guidance scale and denoising steps."""

    @cache
    def unrolled(cfg_scale: float, steps: int) -> fx.GraphModule:
        guided = cfg_scale == CompileConfig().cfg_scale
        graph = captured if guided else capture(tiny_policy, CompileConfig.dense(cfg_scale=cfg_scale))
        return UnrollDiffusion(ddim_steps=steps)(graph)[0]

    return unrolled


@pytest.fixture
def inputs_of(
    golden: dict[str, Any], golden_dir: Path, tiny_policy: CogACT, frame: Image.Image
) -> Callable[[int], tuple[Tensor, ...]]:
    """Inputs of a golden case: frame, ids padded to 32, their number, noise."""

    def prepare(number: int) -> tuple[Tensor, ...]:
        case = golden["cases"][number]
        ids, length = tiny_policy.processor.text(case["instruction"], 32)
        assert ids[:length].tolist() == case["input_ids"]
        image = torch.from_numpy(tiny_policy.processor.image(frame))
        noise = torch.from_numpy(load(golden_dir / case["file"])["noise"])
        return image[None], torch.from_numpy(ids)[None], torch.tensor([length]), noise

    return prepare


def load(path: Path) -> Arrays:
    with np.load(path) as arrays:
        return dict(arrays)


def finished(graph: fx.GraphModule, *lossy: GraphPass) -> fx.GraphModule:
    """Apply rewrites and then the exact ones, in the pipeline's order."""
    return run_passes(graph, (*lossy, NarrowLastLayer(), SpecializeShapes(text_tokens=32), FoldConstants()))[0]


def value(values: dict[fx.Node, Any], gm: fx.GraphModule, stage: str) -> NDArray[Any]:
    array: NDArray[Any] = values[stage_node(gm.graph, stage)].numpy()
    return array


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_dense_graph_equals_public_cogact(
    golden: dict[str, Any],
    golden_dir: Path,
    sampler: Callable[[float, int], fx.GraphModule],
    inputs_of: Callable[[int], tuple[Tensor, ...]],
    node_values: NodeValues,
    number: int,
) -> None:
    case = golden["cases"][number]
    graph = finished(sampler(case["cfg_scale"], case["num_ddim_steps"]))
    values, expected = node_values(graph, inputs_of(number)), load(golden_dir / case["file"])
    for stage in {"vision_patches", "projected"} & set(expected):
        found = value(values, graph, {"vision_patches": "patches"}.get(stage, stage))
        tolerance = TOLERANCES.patches if stage == "vision_patches" else TOLERANCES.projected
        check(stage, found, expected[stage], tolerance=tolerance)
    cognition = value(values, graph, "cognition")
    check("cognition", cognition[:, 0], expected["cognition"], tolerance=TOLERANCES.cognition)
    # The reference carries both guidance halves, which are equal; the graph carries one.
    for step, row in enumerate(expected["trajectory"][1:, :1]):
        x = values[nodes_under(graph.graph, f"{COGACT.denoising}.{step}")[-1]].numpy()
        check(f"trajectory after step {step}", x, row, tolerance=TOLERANCES.trajectory)
    (samples,) = (values[n] for n in graph.graph.output_node().all_input_nodes)
    check("samples", samples.numpy(), expected["samples"], tolerance=TOLERANCES.samples)


@pytest.mark.parametrize("number", range(6))
def test_the_rewritten_graph_equals_the_reference_of_the_method(
    golden: dict[str, Any],
    golden_dir: Path,
    sampler: Callable[[float, int], fx.GraphModule],
    inputs_of: Callable[[int], tuple[Tensor, ...]],
    node_values: NodeValues,
    number: int,
) -> None:
    settings = golden["efficient"][number]
    lossy: list[GraphPass] = []
    if "drop" in settings:
        lossy.append(PruneLayers(keep=tuple(settings["kept_layers"])))
    if "visual_tokens" in settings:
        budget = {name: settings[name] for name in ("visual_tokens", "key_tokens")}
        lossy.append(SelectTokens(**budget, task_share=settings["alpha"]))
    if "cache_interval" in settings:
        lossy.append(CacheFeatures(steps=tuple(range(0, settings["steps"], settings["cache_interval"]))))
    graph = finished(sampler(settings["cfg"], settings["steps"]), *lossy)
    values, expected = node_values(graph, inputs_of(settings["case"])), load(golden_dir / settings["file"])
    cognition = value(values, graph, "cognition")
    check("cognition", cognition[:, 0], expected["cognition"], tolerance=TOLERANCES.cognition)
    (samples,) = (values[n] for n in graph.graph.output_node().all_input_nodes)
    check("samples", samples.numpy(), expected["samples"], tolerance=TOLERANCES.samples)
    assert ("keep" in expected) == ("visual_tokens" in settings)
    if "keep" in expected:
        for name, stage in PATCH_SETS.items():
            assert sorted(value(values, graph, stage)[0].tolist()) == sorted(expected[name].tolist()), name
        relevance = value(values, graph, "relevance")[0]
        score = (relevance - relevance.min()) / (relevance.max() - relevance.min())
        check("relevance", score, expected["score"], tolerance=TOLERANCES.importance)
        (diversity,) = (values[n] for n in graph.graph.nodes if is_call(n, aten.rsub.Scalar))
        check("diversity", diversity[0].numpy(), expected["diversity"], tolerance=TOLERANCES.importance)
