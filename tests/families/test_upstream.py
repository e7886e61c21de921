"""CogACT as upstream runs it: the official keys, the same samples as our own policy, and all the dead work."""

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers.cache_utils import DynamicCache

from evla_compile.families.cogact.capture import capture_upstream
from evla_compile.families.cogact.loading.checkpoint import read_checkpoint
from evla_compile.families.cogact.loading.sizes_from_shapes import infer_sizes
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.families.cogact.model.vision import VisionTower, normalize_pixels
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.flops import flops_by_component
from evla_compile.graph.sites import decoder_layers, indexed_modules, is_call, module_path, nodes_under
from evla_compile.passes import CacheFeatures, PruneLayers, PruneMLP, SelectTokens, UnrollDiffusion
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes, PublishedName, published_sizes
from evla_compile.settings.tolerances import TOLERANCES, relative_error

aten = torch.ops.aten
Inputs = tuple[Tensor, Tensor, Tensor]


def on_meta(sizes: ModelSizes) -> UpstreamCogACT:
    with torch.device("meta"):
        return UpstreamCogACT(sizes).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def small_upstream(small_policy: CogACT) -> UpstreamCogACT:
    """The small policy as upstream would run it; what our own does not have is random."""
    policy = UpstreamCogACT(small_policy.sizes).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(11)
    for parameter in policy.parameters():
        parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    unread, unknown = policy.load_state_dict(small_policy.state_dict(), strict=False)
    assert unread
    assert not unknown
    return policy


@pytest.fixture(scope="module")
def small_upstream_graph(small_upstream: UpstreamCogACT, small_config: CompileConfig) -> fx.GraphModule:
    return capture_upstream(small_upstream, replace(small_config, ddim_steps=3))


@pytest.fixture(scope="module")
def small_unrolled(small_graph: fx.GraphModule) -> fx.GraphModule:
    """Our own small policy over as many denoising steps."""
    return UnrollDiffusion(ddim_steps=3)(small_graph)[0]


@pytest.fixture
def unpadded(small_inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> Inputs:
    """Frames, ids and noise for the small policy, without padding."""
    image, input_ids, _, noise = small_inputs
    return image, input_ids, noise


def test_the_state_dict_is_the_official_files(tiny_policy: CogACT, golden: dict[str, Any]) -> None:
    official = {
        f"{group}.{key}": tuple(shape) for group, keys in golden["manifest"].items() for key, shape in keys.items()
    }
    state = on_meta(tiny_policy.sizes).state_dict()
    assert {key: tuple(tensor.shape) for key, tensor in state.items()} == official


@pytest.mark.parametrize(
    ("name", "action_keys", "parameters"),
    [("small", 62, 7_553_713_991), ("base", 110, 7_630_224_071), ("large", 206, 7_849_001_415)],
)
def test_the_published_sizes_have_the_published_counts(name: PublishedName, action_keys: int, parameters: int) -> None:
    state = on_meta(published_sizes(name)).state_dict()
    assert Counter(key.split(".")[0] for key in state) == {
        "vision_backbone": 685,
        "projector": 6,
        "llm_backbone": 291,
        "action_model": action_keys,
    }
    assert sum(tensor.numel() for tensor in state.values()) == parameters


@pytest.mark.parametrize("name", ["small", "base", "large"])
def test_the_published_sizes_are_those_that_the_checkpoints_shapes_tell(name: PublishedName) -> None:
    sizes = published_sizes(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in on_meta(sizes).state_dict().items()}
    assert infer_sizes(shapes, {}) == sizes


def test_an_unpublished_size_is_refused() -> None:
    with pytest.raises(ValueError, match="published size 'huge': expected one of small, base, large"):
        published_sizes("huge")  # type: ignore[arg-type]  # refused


def test_the_golden_model_samples_as_our_own_policy_does(tiny_checkpoint: Path, tiny_policy: CogACT) -> None:
    policy = UpstreamCogACT(tiny_policy.sizes).eval().requires_grad_(False)
    policy.load_state_dict(read_checkpoint(tiny_checkpoint).tensors, strict=True)
    generator = torch.Generator().manual_seed(5)
    image = torch.randint(0, 256, (1, 224, 224, 3), dtype=torch.uint8, generator=generator)
    input_ids, noise = torch.randint(1, 32000, (1, 20), generator=generator), torch.randn(1, 16, 7, generator=generator)
    samples, *_ = policy(image, input_ids, noise)
    expected = tiny_policy.sample(image, input_ids, torch.tensor([20]), noise)
    assert relative_error(samples.numpy(), expected.numpy()) <= TOLERANCES.samples


@pytest.mark.parametrize(("ddim_steps", "cfg_scale"), [(1, 1.5), (5, 3.0), (5, 1.0)])
def test_a_batch_samples_as_our_own_policy_does(
    small_upstream: UpstreamCogACT, small_policy: CogACT, unpadded: Inputs, ddim_steps: int, cfg_scale: float
) -> None:
    image, input_ids, noise = unpadded
    samples, *_ = small_upstream(*unpadded, ddim_steps=ddim_steps, cfg_scale=cfg_scale)
    expected = small_policy.sample(
        image, input_ids, torch.tensor([9, 9]), noise, ddim_steps=ddim_steps, cfg_scale=cfg_scale
    )
    assert samples.shape == noise.shape
    assert relative_error(samples.numpy(), expected.numpy()) <= TOLERANCES.samples


def test_a_step_count_without_stride_is_refused(small_upstream: UpstreamCogACT, unpadded: Inputs) -> None:
    with pytest.raises(ValueError, match="ddim_steps=11 has no integer stride"):
        small_upstream(*unpadded, ddim_steps=11)


def test_every_position_is_scored(small_upstream: UpstreamCogACT, small_policy: CogACT, unpadded: Inputs) -> None:
    image, input_ids, _ = unpadded
    _, logits, *_ = small_upstream(*unpadded, ddim_steps=1)
    patches = small_policy.projector(small_policy.vision_backbone(image))
    expected = small_upstream.llm_backbone.llm.lm_head(small_policy.llm_backbone(patches, input_ids))
    assert logits.shape == (2, 16 + 9, 64)
    assert relative_error(logits.numpy(), expected.numpy()) <= TOLERANCES.cognition


def test_the_last_block_of_each_tower_is_run(small_upstream: UpstreamCogACT, unpadded: Inputs) -> None:
    _, _, *last_blocks = small_upstream(*unpadded, ddim_steps=1)
    backbone, sizes = small_upstream.vision_backbone, small_upstream.sizes
    pixels = normalize_pixels(unpadded[0])
    towers = (backbone.dino_featurizer, backbone.siglip_featurizer)
    for found, picture, tower, size in zip(last_blocks, pixels, towers, (sizes.dino, sizes.siglip), strict=True):
        deeper = VisionTower(replace(size, depth=size.depth + 1)).requires_grad_(False)
        deeper.load_state_dict({key: tower.state_dict()[key] for key in deeper.state_dict()})
        assert found.shape[1] == 16 + size.prefix_tokens
        assert torch.equal(found[:, size.prefix_tokens :], deeper(picture))


def test_a_key_value_cache_is_filled(
    small_upstream: UpstreamCogACT, unpadded: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []

    class Watched(DynamicCache):
        def __init__(self) -> None:
            super().__init__()
            caches.append(self)

    monkeypatch.setattr("evla_compile.families.cogact.model.upstream.DynamicCache", Watched)
    small_upstream(*unpadded, ddim_steps=1)
    cache: Any
    (cache,) = caches
    assert [layer.keys.shape for layer in cache.layers] == [(2, 4, 16 + 9, 8)] * 4
    assert [layer.values.shape for layer in cache.layers] == [(2, 4, 16 + 9, 8)] * 4


def test_guidance_doubles_every_input_of_every_step(small_upstream: UpstreamCogACT, unpadded: Inputs) -> None:
    net = small_upstream.action_model.net
    watched: dict[str, nn.Module] = {
        name: net.get_submodule(name) for name in ("x_embedder", "t_embedder", "z_embedder", "blocks.0", "final_layer")
    }
    shapes: list[tuple[str, tuple[int, ...]]] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: shapes.append((name, tuple(args[0].shape))))
        for name, module in watched.items()
    ]
    small_upstream(*unpadded, ddim_steps=2)
    for hook in hooks:
        hook.remove()
    assert Counter(shapes) == {
        ("x_embedder", (4, 5, 7)): 2,
        ("t_embedder", (4,)): 2,
        ("z_embedder", (4, 1, 32)): 2,
        ("blocks.0", (4, 6, 20)): 2,
        ("final_layer", (4, 6, 20)): 2,  # condition token included
    }


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="autocast is for CUDA")
def test_on_cuda_autocast_ends_in_front_of_the_action_head(small_upstream: UpstreamCogACT, unpadded: Inputs) -> None:
    policy = UpstreamCogACT(small_upstream.sizes).cuda().requires_grad_(False)
    policy.load_state_dict(small_upstream.state_dict())
    samples, logits, *_ = policy(*(tensor.cuda() for tensor in unpadded))
    assert logits.dtype == torch.bfloat16
    assert samples.dtype == torch.float32
    assert torch.isfinite(samples).all()


def test_the_graph_equals_the_policy_at_every_text_length(
    small_upstream: UpstreamCogACT, small_upstream_graph: fx.GraphModule, unpadded: Inputs
) -> None:
    image, _, noise = unpadded
    for length in (6, 9, 20):
        input_ids = torch.randint(1, 64, (2, length), generator=torch.Generator().manual_seed(length))
        found = small_upstream_graph(image, input_ids, torch.tensor([length] * 2), noise)
        expected = small_upstream(image, input_ids, noise, ddim_steps=3)
        assert len(found) == 4
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_the_graph_has_the_inputs_of_a_finished_one(small_upstream_graph: fx.GraphModule) -> None:
    inputs = {node.target: node.meta["val"] for node in small_upstream_graph.graph.find_nodes(op="placeholder")}
    assert tuple(inputs) == COGACT.input_names
    assert [value.dtype for value in inputs.values()] == [torch.uint8, torch.int64, torch.int64, torch.float32]
    assert inputs["text_length"].shape == (2,)
    assert [
        type(size) for name in ("input_ids", "text_length") for size in inputs[name].shape if not isinstance(size, int)
    ] == [torch.SymInt]


def test_denoising_steps_are_found_where_unrolling_puts_them(
    small_upstream_graph: fx.GraphModule, small_unrolled: fx.GraphModule
) -> None:
    graph = small_upstream_graph.graph
    steps = indexed_modules(graph, COGACT.denoising)
    assert list(steps) == [0, 1, 2]
    assert not nodes_under(graph, COGACT.action_model)
    paths = [
        Counter(module_path(n).removeprefix(f"{COGACT.denoising}.{k}") for n in nodes) for k, nodes in steps.items()
    ]
    assert paths[0] == paths[1]
    assert paths[2] - paths[1] == {"": 1}  # the samples' own half
    assert [n.target for n in steps[1] if module_path(n) == f"{COGACT.denoising}.1"] == [
        *([aten.mul.Tensor] * 2),
        aten.add.Tensor,
    ]
    blocks = f"{COGACT.denoising}.2.{COGACT.action_model}.net.blocks"
    assert {module_path(n) for n in nodes_under(graph, blocks)} == {
        module_path(n) for n in nodes_under(small_unrolled.graph, blocks)
    }


def test_the_graph_shares_the_policys_weights(
    small_upstream: UpstreamCogACT, small_upstream_graph: fx.GraphModule
) -> None:
    pointers = {name: tensor.data_ptr() for name, tensor in small_upstream_graph.state_dict().items()}
    state = {name: tensor.data_ptr() for name, tensor in small_upstream.state_dict().items()}
    unread = {name for name in state if name not in pointers}
    assert all(".attn_pool." in name or "_featurizer.norm." in name or ".history_embedder." in name for name in unread)
    assert {name: pointers[name] for name in state if name in pointers} == {
        name: pointer for name, pointer in state.items() if name in pointers
    }


def test_lossy_rewrites_give_the_samples_that_they_give_on_our_own_graph(
    small_upstream_graph: fx.GraphModule, small_unrolled: fx.GraphModule, unpadded: Inputs
) -> None:
    image, input_ids, noise = unpadded
    rewrites: tuple[GraphPass, ...] = (
        PruneLayers(keep=(0, 1, 3)),
        PruneMLP(neurons=tuple((layer, tuple(range(0, 48, 2))) for layer in (0, 1, 3))),
        SelectTokens(visual_tokens=7, key_tokens=2, task_share=0.5),
        CacheFeatures(steps=(0, 2)),
    )
    ours, theirs = small_unrolled, small_upstream_graph
    for rewrite in rewrites:
        (ours, expected), (theirs, report) = rewrite(ours), rewrite(theirs)
        assert report.changes == expected.changes > 0
    inputs = image, input_ids, torch.tensor([9, 9]), noise
    samples, logits, *_ = theirs(*inputs)
    assert relative_error(samples.numpy(), ours(*inputs).numpy()) <= TOLERANCES.samples
    assert logits.shape == (2, 7 + 9, 64)


def test_layers_are_found_and_their_attention_reads_the_cache(small_upstream_graph: fx.GraphModule) -> None:
    layers = decoder_layers(small_upstream_graph.graph)
    assert [layer.index for layer in layers] == [0, 1, 2, 3]
    assert all(is_call(layer.attention.args[1], aten.cat.default) for layer in layers)


def test_a_policy_without_memory_is_captured(
    small_sizes: ModelSizes, small_config: CompileConfig, small_upstream_graph: fx.GraphModule
) -> None:
    graph = capture_upstream(on_meta(small_sizes), replace(small_config, ddim_steps=1))
    assert {tensor.device.type for tensor in graph.state_dict().values()} == {"meta"}
    step, steps = flops_by_component(graph), flops_by_component(small_upstream_graph)
    assert step == steps | {"action": steps["action"] // 3}
