"""FLOP counts: formulas by hand, torch's own counter, and the published sizes' figures."""

import pytest
import torch
from torch import Tensor, fx, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from evla_compile.capture import capture
from evla_compile.config import CompileConfig
from evla_compile.flops import graph_flops, node_flops, shape_of
from evla_compile.model.action import ActionSizes
from evla_compile.model.language import LanguageSizes
from evla_compile.model.policy import CogACT, ModelSizes
from evla_compile.model.vision import TowerSizes
from evla_compile.passes import NarrowLastLayer
from evla_compile.sites import ACTION_MODEL, DECODER_LAYERS, nodes_under

GIGA = 1e9


class Toy(nn.Module):
    """One of each counted operator, and some that are not."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 5, 2, stride=2)
        self.linear = nn.Linear(7, 11)

    def forward(self, image: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        projected = self.linear(rows)
        attended = functional.scaled_dot_product_attention(projected, projected, projected)
        return self.convolution(image), attended.matmul(attended.transpose(-1, -2)), functional.gelu(rows) * 2


def test_every_matrix_product_counts_two_per_multiply_accumulate() -> None:
    inputs = torch.zeros(2, 3, 8, 6), torch.zeros(2, 4, 9, 7)
    gm = torch.export.export(Toy(), inputs).module(check_guards=False)
    assert isinstance(gm, fx.GraphModule)
    counts = {str(n.target): node_flops(n) for n in gm.graph.nodes if node_flops(n)}
    assert counts == {
        "aten.conv2d.default": 2 * (2 * 5 * 4 * 3) * (3 * 2 * 2),
        "aten.linear.default": 2 * (2 * 4 * 9) * 7 * 11,
        "aten.scaled_dot_product_attention.default": 2 * 2 * (2 * 4) * 9 * 9 * 11,
        "aten.matmul.default": 2 * (2 * 4 * 9 * 9) * 11,
    }
    assert graph_flops(gm.graph.nodes) == sum(counts.values())


def test_the_whole_policy_counts_as_torchs_own_counter_does(
    small_policy: CogACT, small_graph: fx.GraphModule, small_inputs: tuple[Tensor, ...]
) -> None:
    # torch leaves fused attention on a CPU out; its plain form is two matrix products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        small_policy(*small_inputs, torch.tensor([30.0]), cfg_scale=1.5)
    assert graph_flops(small_graph.graph.nodes) == counter.get_total_flops() > 0


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
    sizes = ModelSizes(
        dino=TowerSizes(
            width=1024,
            depth=2,
            heads=16,
            mlp_width=4096,
            patches=256,
            class_tokens=1,
            register_tokens=4,
            layer_scale=True,
        ),
        siglip=TowerSizes(width=1152, depth=2, heads=16, mlp_width=4304, patches=256),
        projector=(2176, 8704, 4096, 4096),
        language=LanguageSizes(width=4096, layers=1, heads=32, kv_heads=32, mlp_width=11008, vocabulary=32064),
        action=ActionSizes(
            width=768,
            depth=1,
            heads=12,
            mlp_width=3072,
            condition_width=4096,
            frequencies=256,
            chunk=16,
            action_width=7,
        ),
    )
    with torch.device("meta"):
        policy = CogACT(sizes, small_policy.processor)
    return capture(policy.requires_grad_(False), CompileConfig.dense(text_tokens=22))


def test_published_sizes_count_as_in_the_literature(full_width: fx.GraphModule) -> None:
    def flops(path: str) -> int:
        return graph_flops(nodes_under(full_width.graph, path))

    dino, siglip, blocks = (
        "vision_backbone.dino_featurizer",
        "vision_backbone.siglip_featurizer",
        f"{ACTION_MODEL}.net.blocks",
    )
    assert flops(f"{dino}.patch_embed") + 23 * flops(f"{dino}.blocks.0") == pytest.approx(157.80 * GIGA, abs=5e6)
    assert flops(f"{siglip}.patch_embed") + 26 * flops(f"{siglip}.blocks.0") == pytest.approx(210.87 * GIGA, abs=5e6)
    assert flops("projector") == pytest.approx(36.54 * GIGA, abs=5e6)
    linears, attention = 2 * 6_476_005_376 * 278, 524_288 * 278**2
    assert 32 * flops(f"{DECODER_LAYERS}.0") == linears + attention
    assert flops(ACTION_MODEL) + 11 * flops(f"{blocks}.0") == pytest.approx(5.813 * GIGA, rel=1e-3)


def test_a_last_layer_with_one_query_counts_as_in_the_literature(full_width: fx.GraphModule) -> None:
    narrowed, _ = NarrowLastLayer()(full_width)
    assert graph_flops(nodes_under(narrowed.graph, f"{DECODER_LAYERS}.0")) == pytest.approx(19.0 * GIGA, abs=5e6)
