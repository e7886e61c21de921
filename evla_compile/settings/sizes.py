"""Sizes of the components of a CogACT policy, and those of the published policies; no torch."""

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

PATCH_SIDE = 14
"""Patch side in pixels of both towers of every published CogACT."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerSizes:
    """Sizes of one vision tower, as its checkpoint's shapes give them (heads excepted)."""

    width: int
    """Channels of a token."""
    depth: int
    """Blocks in the checkpoint; the features are those of the second-to-last, so `depth - 1` blocks are built."""
    heads: int
    """Attention heads; not derivable from shapes."""
    mlp_width: int
    """Hidden neurons of a block's MLP."""
    patches: int
    """Patches of an image, a square number."""
    class_tokens: int = 0
    """1 where the tower prepends a class token, else 0."""
    register_tokens: int = 0
    """Register tokens prepended behind the class token."""
    layer_scale: bool = False
    """Whether attention and MLP outputs are scaled by a learned vector."""

    @property
    def prefix_tokens(self) -> int:
        """Tokens in front of the patches."""
        return self.class_tokens + self.register_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class LanguageSizes:
    """Sizes of the decoder, as its checkpoint's shapes give them (heads excepted)."""

    width: int
    """Channels of a hidden state."""
    layers: int
    """Decoder layers."""
    heads: int
    """Attention heads; not derivable from shapes."""
    kv_heads: int
    """Key and value heads; equal to `heads` in every published CogACT."""
    mlp_width: int
    """Hidden neurons of a layer's gated MLP."""
    vocabulary: int
    """Rows of the token embedding, padding rows included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ActionSizes:
    """Sizes of the action head, as its checkpoint's shapes give them (heads excepted)."""

    width: int
    """Channels of a token."""
    depth: int
    """Transformer blocks."""
    heads: int
    """Attention heads; not derivable from shapes."""
    mlp_width: int
    """Hidden neurons of a block's MLP."""
    condition_width: int
    """Width of the cognition feature."""
    frequencies: int
    """Size of the sinusoidal timestep embedding."""
    chunk: int
    """Action steps predicted at once."""
    action_width: int
    """Dimensions of an action."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """Sizes of all components of a CogACT policy."""

    dino: TowerSizes
    """DINOv2 tower."""
    siglip: TowerSizes
    """SigLIP tower."""
    projector: tuple[int, ...]
    """Widths along the projector, input first."""
    language: LanguageSizes
    """Llama decoder."""
    action: ActionSizes
    """Diffusion transformer."""

    @property
    def image_side(self) -> int:
        """Side in pixels of the square frame that the towers take."""
        return PATCH_SIDE * math.isqrt(self.dino.patches)

    @property
    def patches(self) -> int:
        """Visual tokens of a frame."""
        return self.dino.patches


PublishedName: TypeAlias = Literal["small", "base", "large"]
"""CogACT-Small, -Base and -Large: one vision-language model, three action heads."""


_TOWERS = MappingProxyType({("dino", 1024): (24, 16), ("siglip", 1152): (27, 16)})
"""Depth and heads of the published vision towers, by name and width."""


_LLM_HEADS = MappingProxyType({4096: 32})
"""Heads of the published decoder, by width: pruning its layers does not change them."""


_DIT_HEADS = MappingProxyType({(6, 384): 4, (12, 768): 12, (24, 1024): 16})
"""Heads of the published action heads (CogACT-Small, -Base, -Large), by depth and width."""


_PUBLISHED_DITS = MappingProxyType({"small": (6, 384), "base": (12, 768), "large": (24, 1024)})
"""Depth and width of the published action heads."""


def published_sizes(name: PublishedName) -> ModelSizes:
    """Return the sizes of a published CogACT, for uses without a checkpoint, such as estimates.

    Raises:
        ValueError: `name` is none of "small", "base" and "large".
    """
    if name not in _PUBLISHED_DITS:
        raise ValueError(f"published size {name!r}: expected one of {', '.join(_PUBLISHED_DITS)}")
    depth, width = _PUBLISHED_DITS[name]
    return ModelSizes(
        dino=TowerSizes(
            width=1024,
            depth=24,
            heads=16,
            mlp_width=4096,
            patches=256,
            class_tokens=1,
            register_tokens=4,
            layer_scale=True,
        ),
        siglip=TowerSizes(width=1152, depth=27, heads=16, mlp_width=4304, patches=256),
        projector=(2176, 8704, 4096, 4096),
        language=LanguageSizes(width=4096, layers=32, heads=32, kv_heads=32, mlp_width=11008, vocabulary=32064),
        action=ActionSizes(
            width=width,
            depth=depth,
            heads=_DIT_HEADS[depth, width],
            mlp_width=4 * width,
            condition_width=4096,
            frequencies=256,
            chunk=16,
            action_width=ACTION_WIDTH,
        ),
    )


ACTION_WIDTH = 7
"""Numbers of an action: dx, dy, dz, droll, dpitch, dyaw, gripper; every CogACT has these."""
