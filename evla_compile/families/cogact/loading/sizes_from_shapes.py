"""Derive the sizes of a CogACT model from the shapes of its checkpoint's tensors.

Head counts alone do not follow from shapes: they come from the table of published sizes, else from config.json.
Tensors are named "group.key" after the checkpoint, for instance "projector.projector.0.weight".
"""

from collections.abc import Mapping
from itertools import count
from math import isqrt

from evla_compile.errors import CheckpointError, UnsupportedModelError
from evla_compile.settings.sizes import (
    _DIT_HEADS,
    _LLM_HEADS,
    _TOWERS,
    ACTION_WIDTH,
    PATCH_SIDE,
    ActionSizes,
    LanguageSizes,
    ModelSizes,
    TowerSizes,
)

Shapes = Mapping[str, tuple[int, ...]]


_PARTS = ("dino", "siglip", "llm", "dit")


def infer_sizes(shapes: Shapes, heads: Mapping[str, object]) -> ModelSizes:
    """Return the sizes of the model whose tensors have these shapes.

    Args:
        shapes: shape of every tensor by its name "group.key".
        heads: attention heads by component (dino, siglip, llm, dit) as in config.json; empty for published sizes.

    Raises:
        CheckpointError: a tensor that shows a size is missing or has an impossible shape, or `heads` is malformed.
        UnsupportedModelError: the head count of a component is unknown, or this package cannot build the architecture.
    """
    if unknown := sorted(set(heads) - set(_PARTS)):
        raise CheckpointError(f"config.json, evla_compile.heads: unknown {unknown}; expected among {list(_PARTS)}")
    return ModelSizes(
        dino=_tower(shapes, "dino", heads),
        siglip=_tower(shapes, "siglip", heads),
        projector=_projector(shapes),
        language=_language(shapes, heads),
        action=_action(shapes, heads),
    )


def check_joints(sizes: ModelSizes) -> None:
    """Refuse modules that do not fit together.

    Raises:
        CheckpointError: a module's output is not as wide as the next module's input.
        UnsupportedModelError: the towers cut a frame into different patches, or an action has not 7 numbers.
    """
    towers, width = sizes.dino.width + sizes.siglip.width, sizes.language.width
    for what, found, expected in (
        ("input width of the projector (projector.projector.0.weight)", sizes.projector[0], towers),
        ("output width of the projector", sizes.projector[-1], width),
        ("condition width (action_model.net.z_embedder.linear.weight)", sizes.action.condition_width, width),
    ):
        if found != expected:
            raise CheckpointError(
                f"{what}: expected {expected}, found {found}; the towers give {towers} channels and the decoder is"
                f" {width} wide: the groups come from different models"
            )
    if sizes.dino.patches != sizes.siglip.patches:
        raise UnsupportedModelError(
            f"the vision towers cut a frame into {sizes.dino.patches} (dino) and {sizes.siglip.patches} (siglip)"
            " patches: expected the same count, since their features are joined patch by patch"
        )
    check_action_width(sizes)


def check_action_width(sizes: ModelSizes) -> None:
    """Refuse an action head of another width than 7, which dataset statistics and the gripper rule have.

    Raises:
        UnsupportedModelError: an action has not 7 numbers.
    """
    if sizes.action.action_width != ACTION_WIDTH:
        raise UnsupportedModelError(
            f"an action has {sizes.action.action_width} numbers (action_model.net.final_layer.linear.weight):"
            f" expected {ACTION_WIDTH}, as the gripper rule and the statistics have"
        )


def _tower(shapes: Shapes, part: str, heads: Mapping[str, object]) -> TowerSizes:
    prefix = f"vision_backbone.{part}_featurizer."
    width, *kernel = _shape(shapes, prefix + "patch_embed.proj.weight", 4)
    if kernel != [3, PATCH_SIDE, PATCH_SIDE]:
        raise UnsupportedModelError(
            f"{prefix}patch_embed.proj.weight has the kernel {kernel}: expected {[3, PATCH_SIDE, PATCH_SIDE]}, the RGB"
            " pixels of a patch"
        )
    patches = _shape(shapes, prefix + "pos_embed", 3)[1]
    if isqrt(patches) ** 2 != patches:
        raise UnsupportedModelError(
            f"{prefix}pos_embed has {patches} positions: expected a square number, one for each patch of a square frame"
        )
    published_depth, published_heads = _TOWERS.get((part, width), (None, None))
    return TowerSizes(
        width=width,
        depth=_tower_depth(shapes, prefix, published_depth),
        heads=_heads(part, f"width {width}", width, heads.get(part, published_heads)),
        mlp_width=_shape(shapes, prefix + "blocks.0.mlp.fc1.weight", 2)[0],
        patches=patches,
        class_tokens=1 if prefix + "cls_token" in shapes else 0,
        register_tokens=_shape(shapes, prefix + "reg_token", 3)[1] if prefix + "reg_token" in shapes else 0,
        layer_scale=prefix + "blocks.0.ls1.gamma" in shapes,
    )


def _tower_depth(shapes: Shapes, prefix: str, published: int | None) -> int:
    blocks = _depth(shapes, prefix + "blocks.")
    if blocks + 1 == published:
        return blocks + 1  # the last block never reaches the policy, so a checkpoint may lack it
    if blocks != published and prefix + "norm.weight" not in shapes:
        raise CheckpointError(
            f"{prefix}norm.weight is missing: without it nothing tells whether the last of a tower's blocks has been"
            f" stripped too, hence which of the {blocks} blocks found is the second-to-last that the policy reads; keep"
            " the final norm"
        )
    if blocks < 2:
        raise UnsupportedModelError(f"{prefix}blocks: {blocks} found, expected 2 or more: the last is never read")
    return blocks


def _projector(shapes: Shapes) -> tuple[int, ...]:
    prefix = "projector.projector."
    numbers = _numbers(shapes, prefix)
    linear = [n for n in numbers if f"{prefix}{n}.weight" in shapes or f"{prefix}{n}.bias" in shapes]
    weights = [_shape(shapes, f"{prefix}{n}.weight", 2) for n in range(0, max(linear, default=0) + 1, 2)]
    return (weights[0][1], *(weight[0] for weight in weights))


def _language(shapes: Shapes, heads: Mapping[str, object]) -> LanguageSizes:
    prefix = "llm_backbone.llm.model."
    vocabulary, width = _shape(shapes, prefix + "embed_tokens.weight", 2)
    query_heads = _heads("llm", f"width {width}", width, heads.get("llm", _LLM_HEADS.get(width)))
    head_width, key_name = width // query_heads, prefix + "layers.0.self_attn.k_proj.weight"
    layers = _depth(shapes, prefix + "layers.")
    key_heads, rest = divmod(_shape(shapes, key_name, 2)[0], head_width)
    if rest or query_heads % key_heads or head_width % 2:
        raise CheckpointError(
            f"{key_name} has the shape {list(shapes[key_name])}: expected as many rows as a divisor of the"
            f" {query_heads} heads times their width, which must be even and is {head_width}; check evla_compile.heads"
            " in config.json"
        )
    return LanguageSizes(
        width=width,
        layers=layers,
        heads=query_heads,
        kv_heads=key_heads,
        mlp_width=_shape(shapes, prefix + "layers.0.mlp.gate_proj.weight", 2)[0],
        vocabulary=vocabulary,
    )


def _action(shapes: Shapes, heads: Mapping[str, object]) -> ActionSizes:
    prefix = "action_model.net."
    positions, width = _shape(shapes, prefix + "positional_embedding", 2)
    if positions < 2:
        raise CheckpointError(
            f"{prefix}positional_embedding has {positions} row: expected one for the condition and one for each action"
        )
    frequencies = _shape(shapes, prefix + "t_embedder.mlp.0.weight", 2)[1]
    if frequencies % 2:
        raise CheckpointError(
            f"{prefix}t_embedder.mlp.0.weight takes {frequencies} numbers: expected an even count, cosines and sines"
        )
    depth = _depth(shapes, prefix + "blocks.")
    return ActionSizes(
        width=width,
        depth=depth,
        heads=_heads("dit", f"depth {depth}, width {width}", width, heads.get("dit", _DIT_HEADS.get((depth, width)))),
        mlp_width=_shape(shapes, prefix + "blocks.0.mlp.fc1.weight", 2)[0],
        condition_width=_shape(shapes, prefix + "z_embedder.linear.weight", 2)[1],
        frequencies=frequencies,
        chunk=positions - 1,
        action_width=_shape(shapes, prefix + "final_layer.linear.weight", 2)[0],
    )


def _heads(part: str, size: str, width: int, heads: object) -> int:
    if heads is None:
        raise UnsupportedModelError(
            f"{part}: the number of attention heads does not follow from shapes, and {size} is no published size; add"
            f' {{"evla_compile": {{"heads": {{"{part}": HEADS}}}}}} to config.json, with the number in place of HEADS'
        )
    if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or width % heads:
        raise CheckpointError(
            f"config.json, evla_compile.heads.{part} = {heads!r}: expected a whole number that divides width {width}"
        )
    return heads


def _depth(shapes: Shapes, prefix: str) -> int:
    """Return the number of blocks under a prefix; refuse gaps in their numbers."""
    numbers = _numbers(shapes, prefix)
    depth = next(number for number in count() if number not in numbers)
    if depth != len(numbers):
        raise CheckpointError(
            f"no tensors of {prefix}{depth} are there, of {len(numbers)} blocks found: expected blocks numbered from 0"
            " without a gap; is the file cut or converted?"
        )
    return depth


def _numbers(shapes: Shapes, prefix: str) -> set[int]:
    heads = (name.removeprefix(prefix).split(".")[0] for name in shapes if name.startswith(prefix))
    return {int(head) for head in heads if head.isdecimal()}


def _shape(shapes: Shapes, name: str, rank: int) -> tuple[int, ...]:
    if name not in shapes:
        group = name.split(".", 1)[0]
        found = [other for other in shapes if other.startswith(group + ".")]
        raise CheckpointError(
            f"missing key {name}: expected CogACT's own key names, found {len(found)} keys in the group {group!r}, such"
            f" as {', '.join(found[:3]) or 'none'}"
        )
    shape = shapes[name]
    if len(shape) != rank or 0 in shape:
        raise CheckpointError(f"{name} has the shape {list(shape)}: expected {rank} dimensions, none of them empty")
    return shape
