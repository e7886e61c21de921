from collections import Counter
from collections.abc import Callable
from math import prod
from typing import Any

import pytest
import torch

from evla_compile.errors import CheckpointError, UnsupportedModelError
from evla_compile.families.cogact.loading.sizes_from_shapes import check_joints, infer_sizes
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.processor import Processor
from evla_compile.settings.sizes import PublishedName, published_sizes

Shapes = dict[str, tuple[int, ...]]

DINO = "vision_backbone.dino_featurizer."
SIGLIP = "vision_backbone.siglip_featurizer."
LLM = "llm_backbone.llm.model."
DIT = "action_model.net."

PUBLISHED = {"small": (6, 384, 4), "base": (12, 768, 12), "large": (24, 1024, 16)}


def linear(name: str, outputs: int, inputs: int, *, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs)} | ({f"{name}.bias": (outputs,)} if bias else {})


def attention_and_mlp(name: str, width: int, mlp: int) -> Shapes:
    return (
        linear(f"{name}.attn.qkv", 3 * width, width)
        | linear(f"{name}.attn.proj", width, width)
        | linear(f"{name}.mlp.fc1", mlp, width)
        | linear(f"{name}.mlp.fc2", width, mlp)
    )


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def tower(prefix: str, width: int, depth: int, mlp: int, *, layer_scale: bool) -> Shapes:
    shapes: Shapes = {prefix + "pos_embed": (1, 256, width), prefix + "patch_embed.proj.weight": (width, 3, 14, 14)}
    shapes |= {prefix + "patch_embed.proj.bias": (width,)} | norm(prefix + "norm", width)
    for block in (f"{prefix}blocks.{i}" for i in range(depth)):
        shapes |= norm(block + ".norm1", width) | norm(block + ".norm2", width) | attention_and_mlp(block, width, mlp)
        if layer_scale:
            shapes |= {block + ".ls1.gamma": (width,), block + ".ls2.gamma": (width,)}
    return shapes


def siglip_pool(width: int, mlp: int) -> Shapes:
    pool = SIGLIP + "attn_pool."
    shapes: Shapes = {pool + "latent": (1, 1, width)} | norm(pool + "norm", width)
    shapes |= linear(pool + "q", width, width) | linear(pool + "kv", 2 * width, width)
    shapes |= linear(pool + "proj", width, width)
    return shapes | linear(pool + "mlp.fc1", mlp, width) | linear(pool + "mlp.fc2", width, mlp)


def llama(width: int, layers: int, mlp: int, vocabulary: int) -> Shapes:
    shapes: Shapes = {LLM + "embed_tokens.weight": (vocabulary, width), LLM + "norm.weight": (width,)}
    for layer in (f"{LLM}layers.{i}." for i in range(layers)):
        shapes |= {layer + name: (width,) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
        for name in "qkvo":
            shapes |= linear(f"{layer}self_attn.{name}_proj", width, width, bias=False)
        for name, sides in (("gate", (mlp, width)), ("up", (mlp, width)), ("down", (width, mlp))):
            shapes |= linear(f"{layer}mlp.{name}_proj", *sides, bias=False)
    return shapes | linear("llm_backbone.llm.lm_head", vocabulary, width, bias=False)


def dit(depth: int, width: int, condition: int) -> Shapes:
    shapes: Shapes = {DIT + "positional_embedding": (17, width), DIT + "z_embedder.uncondition": (1, condition)}
    for name, inputs in (("x", 7), ("history", 7), ("z", condition)):
        shapes |= linear(f"{DIT}{name}_embedder.linear", width, inputs)
    shapes |= linear(DIT + "t_embedder.mlp.0", width, 256) | linear(DIT + "t_embedder.mlp.2", width, width)
    for block in range(depth):
        shapes |= attention_and_mlp(f"{DIT}blocks.{block}", width, 4 * width)
    return shapes | linear(DIT + "final_layer.linear", 7, width)


def cogact(size: str) -> Shapes:
    """Return every name and shape of a published CogACT, written from its layer list."""
    depth, width, _ = PUBLISHED[size]
    shapes = tower(DINO, 1024, 24, 4096, layer_scale=True) | tower(SIGLIP, 1152, 27, 4304, layer_scale=False)
    shapes |= {DINO + "cls_token": (1, 1, 1024), DINO + "reg_token": (1, 4, 1024)} | siglip_pool(1152, 4304)
    for index, outputs, inputs in ((0, 8704, 2176), (2, 4096, 8704), (4, 4096, 4096)):
        shapes |= linear(f"projector.projector.{index}", outputs, inputs)
    return shapes | llama(4096, 32, 11008, 32064) | dit(depth, width, 4096)


@pytest.fixture
def tiny(golden: dict[str, Any]) -> Shapes:
    """Every name and shape of the tiny golden model, whose sizes are in no table."""
    return {f"{group}.{key}": tuple(shape) for group, keys in golden["manifest"].items() for key, shape in keys.items()}


HEADS = {"dino": 3, "siglip": 2, "llm": 4, "dit": 4}


@pytest.mark.parametrize(
    ("size", "keys", "parameters"),
    [("small", 62, 7_553_713_991), ("base", 110, 7_630_224_071), ("large", 206, 7_849_001_415)],
)
def test_published_sizes_need_no_head_counts(size: PublishedName, keys: int, parameters: int) -> None:
    shapes = cogact(size)
    groups = Counter(name.split(".")[0] for name in shapes)
    assert groups == {"vision_backbone": 685, "projector": 6, "llm_backbone": 291, "action_model": keys}
    assert sum(map(prod, shapes.values())) == parameters
    depth, width, heads = PUBLISHED[size]
    sizes = infer_sizes(shapes, {})
    check_joints(sizes)
    assert sizes == published_sizes(size)
    assert (sizes.action.depth, sizes.action.width, sizes.action.heads) == (depth, width, heads)
    assert sizes.image_side == 224


def test_the_model_built_from_base_sizes_has_the_used_tensors_of_the_checkpoint(tokenizer_json: str) -> None:
    shapes = cogact("base")
    sizes = infer_sizes(shapes, {})
    with torch.device("meta"):
        model = CogACT(sizes, Processor(tokenizer_json=tokenizer_json, statistics={}, image_side=sizes.image_side))
    built = {name: tuple(parameter.shape) for name, parameter in model.state_dict().items()}
    assert built.items() <= shapes.items()
    assert sum(map(prod, built.values())) == 7_455_803_303


def test_unpublished_sizes_take_their_head_counts_from_the_settings(tiny: Shapes) -> None:
    sizes = infer_sizes(tiny, HEADS)
    check_joints(sizes)
    assert (sizes.dino.heads, sizes.siglip.heads, sizes.language.heads, sizes.action.heads) == (3, 2, 4, 4)
    assert (sizes.dino.depth, sizes.siglip.depth, sizes.language.layers, sizes.action.depth) == (3, 4, 6, 4)
    assert sizes.siglip.mlp_width == 119
    assert sizes.action.condition_width == 64


def test_head_counts_in_the_settings_win_over_the_table() -> None:
    assert infer_sizes(cogact("small"), {"dit": 6}).action.heads == 6


@pytest.mark.parametrize(
    ("part", "size"),
    [("dino", "width 48"), ("siglip", "width 32"), ("llm", "width 64"), ("dit", "depth 4, width 48")],
)
def test_unknown_head_counts_say_what_to_add_where(tiny: Shapes, part: str, size: str) -> None:
    heads = {other: count for other, count in HEADS.items() if other != part}
    with pytest.raises(UnsupportedModelError) as caught:
        infer_sizes(tiny, heads)
    assert str(caught.value).startswith(f"{part}: ")
    assert size in str(caught.value)
    assert f'{{"evla_compile": {{"heads": {{"{part}": HEADS}}}}}} to config.json' in str(caught.value)


@pytest.mark.parametrize("count", [0, -4, 5, True, "4", 4.0, [4]])
def test_a_head_count_must_be_a_whole_number_that_divides_the_width(tiny: Shapes, count: object) -> None:
    with pytest.raises(CheckpointError, match=r"evla_compile\.heads\.llm = .*divides width 64"):
        infer_sizes(tiny, {**HEADS, "llm": count})


def test_a_head_count_of_an_unknown_part_is_refused(tiny: Shapes) -> None:
    with pytest.raises(
        CheckpointError, match=r"unknown \['dinov2'\]; expected among \['dino', 'siglip', 'llm', 'dit'\]"
    ):
        infer_sizes(tiny, {**HEADS, "dinov2": 3})


def test_fewer_key_rows_make_grouped_query_attention(tiny: Shapes) -> None:
    tiny[LLM + "layers.0.self_attn.k_proj.weight"] = (32, 64)
    assert infer_sizes(tiny, HEADS).language.kv_heads == 2


@pytest.mark.parametrize("rows", [8, 20, 48])
def test_key_rows_that_are_no_heads_are_refused(tiny: Shapes, rows: int) -> None:
    tiny[LLM + "layers.0.self_attn.k_proj.weight"] = (rows, 64)
    with pytest.raises(CheckpointError, match=rf"k_proj\.weight has the shape \[{rows}, 64\]"):
        infer_sizes(tiny, HEADS)


def test_an_odd_head_width_cannot_be_rotated(tiny: Shapes) -> None:
    with pytest.raises(CheckpointError, match="must be even and is 1"):
        infer_sizes(tiny, {**HEADS, "llm": 64})


def test_a_tower_without_class_and_register_tokens_has_none(tiny: Shapes) -> None:
    del tiny[DINO + "cls_token"], tiny[DINO + "reg_token"]
    assert infer_sizes(tiny, HEADS).dino.prefix_tokens == 0


def without(shapes: Shapes, *beginnings: str) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith(beginnings)}


def test_a_published_tower_may_lack_its_last_block_and_norm() -> None:
    whole = cogact("base")
    for last_blocks in ((), (DINO + "blocks.23.", SIGLIP + "blocks.26.")):
        stripped = without(whole, DINO + "norm.", SIGLIP + "norm.", *last_blocks)
        assert infer_sizes(stripped, {}) == infer_sizes(whole, {})


def test_another_tower_without_its_final_norm_has_no_certain_depth(tiny: Shapes) -> None:
    with pytest.raises(CheckpointError, match=r"dino_featurizer\.norm\.weight is missing.* keep the final norm"):
        infer_sizes(without(tiny, DINO + "norm."), HEADS)


def test_a_tower_of_one_block_has_no_second_to_last(tiny: Shapes) -> None:
    with pytest.raises(UnsupportedModelError, match=r"dino_featurizer\.blocks: 1 found, expected 2 or more"):
        infer_sizes(without(tiny, DINO + "blocks.1.", DINO + "blocks.2."), HEADS)


@pytest.mark.parametrize(
    ("prefix", "gap"), [(DINO + "blocks.", 0), (SIGLIP + "blocks.", 2), (LLM + "layers.", 3), (DIT + "blocks.", 1)]
)
def test_a_gap_in_the_blocks_is_named(tiny: Shapes, prefix: str, gap: int) -> None:
    with pytest.raises(CheckpointError, match=rf"no tensors of {prefix}{gap} are there"):
        infer_sizes(without(tiny, f"{prefix}{gap}."), HEADS)


def test_a_hostile_block_number_is_a_gap_rather_than_a_huge_model(tiny: Shapes) -> None:
    tiny[LLM + "layers.999999999.mlp.up_proj.weight"] = (1, 1)
    with pytest.raises(CheckpointError, match=rf"no tensors of {LLM}layers\.6 are there"):
        infer_sizes(tiny, HEADS)


@pytest.mark.parametrize(
    "name",
    [
        DINO + "patch_embed.proj.weight",
        SIGLIP + "pos_embed",
        DINO + "blocks.0.mlp.fc1.weight",
        "projector.projector.2.weight",
        "projector.projector.4.weight",
        LLM + "embed_tokens.weight",
        LLM + "layers.0.self_attn.k_proj.weight",
        LLM + "layers.0.mlp.gate_proj.weight",
        DIT + "positional_embedding",
        DIT + "t_embedder.mlp.0.weight",
        DIT + "z_embedder.linear.weight",
        DIT + "final_layer.linear.weight",
    ],
)
def test_a_missing_tensor_that_tells_a_size_is_named(tiny: Shapes, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"missing key {name}: .*found \d+ keys in the group"):
        infer_sizes(without(tiny, name), HEADS)


@pytest.mark.parametrize("shape", [(), (48,), (0, 48), (17, 48, 1)])
def test_a_tensor_of_another_rank_or_without_elements_tells_no_size(tiny: Shapes, shape: tuple[int, ...]) -> None:
    tiny[DIT + "positional_embedding"] = shape
    with pytest.raises(CheckpointError, match=r"positional_embedding has the shape .*expected 2 dimensions"):
        infer_sizes(tiny, HEADS)


@pytest.mark.parametrize(
    ("name", "shape", "kind", "message"),
    [
        (DINO + "patch_embed.proj.weight", (48, 3, 16, 16), UnsupportedModelError, r"kernel \[3, 16, 16\]: expected"),
        (SIGLIP + "patch_embed.proj.weight", (32, 6, 14, 14), UnsupportedModelError, r"kernel \[6, 14, 14\]"),
        (DINO + "pos_embed", (1, 257, 48), UnsupportedModelError, "257 positions: expected a square number"),
        (DIT + "positional_embedding", (1, 48), CheckpointError, "has 1 row: expected one for the condition"),
        (DIT + "t_embedder.mlp.0.weight", (48, 255), CheckpointError, "takes 255 numbers: expected an even count"),
    ],
)
def test_a_shape_that_no_cogact_has_is_refused(
    tiny: Shapes, name: str, shape: tuple[int, ...], kind: type[Exception], message: str
) -> None:
    tiny[name] = shape
    with pytest.raises(kind, match=message):
        infer_sizes(tiny, HEADS)


def set_projector_input(shapes: Shapes) -> None:
    shapes["projector.projector.0.weight"] = (320, 81)


def cut_projector(shapes: Shapes) -> None:
    del shapes["projector.projector.4.weight"], shapes["projector.projector.4.bias"]
    shapes["projector.projector.2.weight"] = (63, 320)


def set_condition(shapes: Shapes) -> None:
    shapes[DIT + "z_embedder.linear.weight"] = (48, 4096)


def set_patches(shapes: Shapes) -> None:
    shapes[SIGLIP + "pos_embed"] = (1, 729, 32)


def set_action_width(shapes: Shapes) -> None:
    shapes[DIT + "final_layer.linear.weight"] = (14, 48)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        (set_projector_input, CheckpointError, "input width of the projector .*: expected 80, found 81"),
        (cut_projector, CheckpointError, "output width of the projector: expected 64, found 63"),
        (set_condition, CheckpointError, "condition width .*: expected 64, found 4096"),
        (set_patches, UnsupportedModelError, r"256 \(dino\) and 729 \(siglip\) patches"),
        (set_action_width, UnsupportedModelError, "an action has 14 numbers .*: expected 7"),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(
    tiny: Shapes, change: Callable[[Shapes], None], kind: type[Exception], message: str
) -> None:
    change(tiny)
    sizes = infer_sizes(tiny, HEADS)
    with pytest.raises(kind, match=message):
        check_joints(sizes)


def test_the_image_side_follows_from_the_patches(tiny: Shapes) -> None:
    tiny[DINO + "pos_embed"], tiny[SIGLIP + "pos_embed"] = (1, 729, 48), (1, 729, 32)
    assert infer_sizes(tiny, HEADS).image_side == 378
