"""FLOP counts: formulas by hand, torch's own counter, and the published sizes' figures."""

from collections.abc import Iterable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT, NoisePrediction
from evla_compile.graph.flops import (
    Convention,
    component_of,
    flops_by_component,
    graph_flops,
    node_flops,
    product_flops,
    shape_of,
)
from evla_compile.graph.sites import nodes_under
from evla_compile.passes import NarrowLastLayer, SelectTokens
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import published_sizes

GIGA = 1e9


class Toy(nn.Module):
    """Some of every rule."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 2, stride=2)
        self.linear = nn.Linear(7, 11)
        self.affine = nn.LayerNorm(11)
        self.plain = nn.LayerNorm(7, elementwise_affine=False)

    def forward(self, image: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        projected = self.affine(self.linear(functional.gelu(self.plain(rows))))
        attended = functional.scaled_dot_product_attention(projected, projected, projected[..., :3])
        scores = projected.matmul(projected.transpose(-1, -2)).softmax(-1)
        position = torch.arange(9) + 1
        free = torch.cat([rows, rows]).to(torch.float64).clone()
        chosen = scores.gather(3, position.argsort().expand(2, 4, 9, 9))
        return self.convolution(image), attended.mean(2), (rows * 2).relu(), free, chosen, position.sum(), rows > 0


@pytest.fixture(scope="module")
def toy() -> fx.GraphModule:
    inputs = torch.zeros(2, 3, 8, 6), torch.zeros(2, 4, 9, 7)
    gm = torch.export.export(Toy().requires_grad_(False), inputs).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    return gm


def counts(gm: fx.GraphModule, convention: Convention) -> dict[str, list[int]]:
    """Return what every operator that counts counts."""
    found: dict[str, list[int]] = {}
    for node in gm.graph.nodes:
        if flops := node_flops(node, convention):
            found.setdefault(str(node.target).removeprefix("aten."), []).append(flops)
    return found


PAPER = {
    "conv2d.default": [2 * (2 * 5 * 4 * 3) * (3 * 2 * 2)],
    "linear.default": [2 * (2 * 4 * 9) * 7 * 11],
    "layer_norm.default": [4 * (2 * 4 * 9 * 7), 5 * (2 * 4 * 9 * 11)],
    "gelu.default": [2 * 4 * 9 * 7],
}


def test_all_counts_everything_that_is_executed(toy: fx.GraphModule) -> None:
    rows, scores = 2 * 4 * 9, 2 * 4 * 9 * 9
    assert counts(toy, "all") == PAPER | {
        "scaled_dot_product_attention.default": [2 * scores * (11 + 3) + 5 * scores],
        "matmul.default": [2 * scores * 11],
        "softmax.int": [5 * scores],
        "mean.dim": [rows * 3],
        "mul.Tensor": [rows * 7],
        "relu.default": [rows * 7],
    }


def test_the_paper_counts_what_its_profiler_saw(toy: fx.GraphModule) -> None:
    assert counts(toy, "paper") == PAPER


def test_all_is_the_default(toy: fx.GraphModule) -> None:
    everything = sum(sum(each) for each in counts(toy, "all").values())
    assert graph_flops(toy.graph.nodes) == graph_flops(toy.graph.nodes, "all") == everything
    assert sum(map(node_flops, toy.graph.nodes)) == everything


def test_an_unknown_convention_is_refused(toy: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match="convention='macs': expected one of paper, all"):
        graph_flops(toy.graph.nodes, "macs")  # type: ignore[arg-type]  # refused


@pytest.mark.parametrize("convention", ["paper", "all"])
def test_the_components_of_a_policy_are_the_whole(small_sampler: fx.GraphModule, convention: Convention) -> None:
    selected, _ = SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5)(small_sampler)
    graph, components = selected.graph, flops_by_component(selected, convention)
    assert list(components) == ["vision", "language", "action"]
    for component, paths in (
        ("vision", ("vision_backbone", "projector")),
        ("language", ("llm_backbone", "select_tokens")),
        (
            "action",
            (COGACT.action_model, COGACT.denoising),
        ),  # embedding the cognition feature stays in front of the loop
    ):
        expected = sum(graph_flops(nodes_under(graph, path), convention) for path in paths)
        assert components[component] == expected > 0  # type: ignore[index]  # a literal
    assert sum(components.values()) == graph_flops(graph.nodes, convention)


def test_operators_outside_a_policy_are_refused(toy: fx.GraphModule) -> None:
    with pytest.raises(ValueError, match=r"path 'plain': expected one under vision_backbone, projector, llm_backbone"):
        flops_by_component(toy)


@pytest.mark.parametrize(
    ("path", "component"),
    [
        ("vision_backbone.dino_featurizer.blocks.0", "vision"),
        ("projector.projector.2", "vision"),
        ("llm_backbone.llm.lm_head.weight", "language"),
        ("select_tokens", "language"),
        ("", "language"),
        ("action_model.net", "action"),
        ("denoising.3", "action"),
    ],
)
def test_every_path_belongs_to_a_component(path: str, component: str) -> None:
    assert component_of(path) == component


def test_a_path_in_no_component_is_refused() -> None:
    with pytest.raises(ValueError, match="path 'actions'"):
        component_of("actions")


def products(nodes: Iterable[fx.Node]) -> int:
    return sum(map(product_flops, nodes))


def test_matrix_products_count_as_torchs_own_counter_does(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: tuple[Tensor, ...]
) -> None:
    # torch leaves fused attention on a CPU out; its plain form is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        NoisePrediction(small_policy)(*small_inputs, torch.tensor([30.0]), cfg_scale=1.5)
    assert products(small_graph.graph.nodes) == counter.get_total_flops() > 0


def test_a_symbolic_size_counts_with_its_value_at_capture(small_graph: fx.GraphModule) -> None:
    (embedding,) = (n for n in nodes_under(small_graph.graph, "llm_backbone") if "embedding" in str(n.target))
    assert isinstance(embedding.meta["val"].shape[1], torch.SymInt)
    assert shape_of(embedding) == (2, 9, 32)


def test_only_nodes_have_a_shape() -> None:
    with pytest.raises(TypeError, match="expected a graph node, found 3"):
        shape_of(3)


@pytest.fixture(scope="module")
def full_width(small_policy: CogACT) -> fx.GraphModule:
    """CogACT-Base at a prompt of 22 tokens, without memory, each repeated block once."""
    base = published_sizes("base")
    sizes = replace(
        base,
        dino=replace(base.dino, depth=2),
        siglip=replace(base.siglip, depth=2),
        language=replace(base.language, layers=1),
        action=replace(base.action, depth=1),
    )
    with torch.device("meta"):
        policy = CogACT(sizes, small_policy.processor)
    return capture(policy.requires_grad_(False), CompileConfig.dense(text_tokens=22))


def test_published_sizes_count_as_in_the_literature(full_width: fx.GraphModule) -> None:
    def flops(path: str) -> int:
        return products(nodes_under(full_width.graph, path))

    dino, siglip, blocks = (
        "vision_backbone.dino_featurizer",
        "vision_backbone.siglip_featurizer",
        f"{COGACT.action_model}.net.blocks",
    )
    assert flops(f"{dino}.patch_embed") + 23 * flops(f"{dino}.blocks.0") == pytest.approx(157.80 * GIGA, abs=5e6)
    assert flops(f"{siglip}.patch_embed") + 26 * flops(f"{siglip}.blocks.0") == pytest.approx(210.87 * GIGA, abs=5e6)
    assert flops("projector") == pytest.approx(36.54 * GIGA, abs=5e6)
    linears, attention = 2 * 6_476_005_376 * 278, 524_288 * 278**2
    assert 32 * flops(f"{COGACT.decoder_layers}.0") == linears + attention
    assert flops(COGACT.action_model) + 11 * flops(f"{blocks}.0") == pytest.approx(5.813 * GIGA, rel=1e-3)


def test_a_last_layer_with_one_query_counts_as_in_the_literature(full_width: fx.GraphModule) -> None:
    narrowed, _ = NarrowLastLayer()(full_width)
    assert products(nodes_under(narrowed.graph, f"{COGACT.decoder_layers}.0")) == pytest.approx(19.0 * GIGA, abs=5e6)
