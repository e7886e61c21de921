"""Every rule of `SelectTokens` on ONNX Runtime against its graph in torch, in float32 and in half precision."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, fx

from evla_compile.exporters.to_onnx import to_onnx
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import module_path
from evla_compile.passes import (
    ExposeStages,
    FoldConstants,
    LowerPrecision,
    SelectTokens,
    SpecializeShapes,
)
from evla_compile.passes.lower_precision import lowered_sites
from evla_compile.runtime.widening import widen
from evla_compile.settings.budgets.tokens import TOKEN_RULES, TokenRule
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.precision import LOWER_PRECISIONS, LowerPrecisionName
from evla_compile.settings.tolerances import TOLERANCES, check

TIME = torch.tensor([30.0])


def finished(
    graph: fx.GraphModule, rule: TokenRule, *, merge: bool, count: int = 7
) -> tuple[fx.GraphModule, list[str]]:
    """Return a static graph of what leads to the layer behind the selection, and the names of its outputs."""
    stages = ["layers.2", "kept_patches", *(["merge_weights"] if merge else [])]
    selection = SelectTokens(
        visual_tokens=count, key_tokens=2, task_share=0.5, token_rule=rule, token_seed=5, merge_tokens=merge
    )
    passes = (selection, SpecializeShapes(text_tokens=9), FoldConstants())
    return run_passes(graph, (*passes, ExposeStages(stages=tuple(stages))))[0], stages


def compare(
    graph: fx.GraphModule,
    stages: list[str],
    inputs: tuple[Tensor, ...],
    path: Path,
    *,
    opset: int = 23,
    tolerance: float = TOLERANCES.lowered,
) -> None:
    to_onnx(graph, path, outputs=stages, opset=opset)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    assert all(isinstance(size, int) for output in session.get_outputs() for size in output.shape)
    feeds = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), inputs, strict=True)}
    found = dict(zip(stages, session.run(stages, feeds), strict=True))
    expected = dict(zip(stages, (value.numpy() for value in graph(*inputs)), strict=True))
    assert found["kept_patches"].dtype == np.int64
    assert found["kept_patches"].tolist() == expected["kept_patches"].tolist()
    for stage in set(stages) - {"kept_patches"}:
        check(stage, found[stage], expected[stage], tolerance=tolerance)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("rule", TOKEN_RULES)
def test_onnx_selects_and_merges_as_the_graph_does(
    small_graph: fx.GraphModule, small_inputs: tuple[Tensor, ...], tmp_path: Path, rule: TokenRule, merge: bool
) -> None:
    graph, stages = finished(small_graph, rule, merge=merge)
    compare(graph, stages, (*small_inputs, TIME), tmp_path / "selected.onnx")


def test_a_single_row_and_an_older_opset_select_alike(
    small_policy: CogACT, small_inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    graph, stages = finished(capture(small_policy, CompileConfig.dense(text_tokens=9)), "coverage", merge=True)
    row = tuple(value[1:] for value in small_inputs)
    compare(graph, stages, (*row, TIME), tmp_path / "selected.onnx", opset=18)


@pytest.mark.parametrize("rule", ["relevance", "coverage"])
def test_a_decoder_with_shared_key_heads_selects_alike(
    small_grouped_policy: CogACT,
    small_config: CompileConfig,
    small_inputs: tuple[Tensor, ...],
    tmp_path: Path,
    rule: TokenRule,
) -> None:
    graph, stages = finished(capture(small_grouped_policy, small_config), rule, merge=True)
    compare(graph, stages, (*small_inputs, TIME), tmp_path / "selected.onnx")


@pytest.mark.parametrize("dtype", LOWER_PRECISIONS)
def test_in_half_precision_tokens_are_selected_and_merged_in_float32(
    small_graph: fx.GraphModule, small_inputs: tuple[Tensor, ...], tmp_path: Path, dtype: LowerPrecisionName
) -> None:
    graph, stages = finished(small_graph, "coverage", merge=True)
    ranges = tuple((module_path(site), 1.0) for site in lowered_sites(graph.graph))
    lowered, _ = LowerPrecision(dtype=dtype, ranges=ranges)(graph)
    values = [node.meta["val"] for node in lowered.graph.nodes if module_path(node) == "select_tokens"]
    tensors = [value for value in values if isinstance(value, Tensor)]
    assert {tensor.dtype for tensor in tensors} == {torch.float32, torch.int64, torch.bool}
    to_onnx(lowered, tmp_path / "lowered.onnx", outputs=stages)
    model = onnx.load(tmp_path / "lowered.onnx")
    if dtype == "bfloat16":
        widen(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    inputs = (*small_inputs, TIME)
    feeds = {spec.name: value.numpy() for spec, value in zip(session.get_inputs(), inputs, strict=True)}
    found = session.run(stages, feeds)
    for stage, value, expected in zip(stages, found, lowered(*inputs), strict=True):
        if stage == "layers.2":
            check(stage, value, expected.numpy(), tolerance=0.05)  # of half precision; the choice is the same
        else:
            assert np.array_equal(value, expected.numpy()), stage
