"""Turn budgets into counts for one model: how many layers, MLP neurons and visual tokens stay; no torch.

A budget may be a share of what a model has, or a count that exceeds it. Settings are compared with sizes here alone.
"""

from dataclasses import replace
from typing import TYPE_CHECKING

from evla_compile.settings.config import CompileConfig, Share, check_key_tokens

if TYPE_CHECKING:
    from evla_compile.settings.sizes import LanguageSizes, ModelSizes

NEURON_MULTIPLE = 64
"""MLP widths are rounded to multiples of this, since matrix units of GPUs compute in tiles of such sizes."""

_FEWEST_LAYERS = 3
"""Layers that a selection of visual tokens needs at least: two in front of it for the scores, and one behind it."""


def resolve(config: CompileConfig, sizes: "ModelSizes") -> CompileConfig:
    """Return the configuration with the counts that its shares are in a model of these sizes; None stays None.

    A configuration of counts is returned unchanged, so the function may be applied twice.

    Raises:
        ValueError: a budget does not fit the sizes; the message names the setting, its value and one that fits.
    """
    keep_layers = resolve_layers(config, sizes.language)
    visual_tokens, key_tokens = resolve_tokens(config, sizes.patches)
    if visual_tokens < sizes.patches:
        _check_selection(visual_tokens, kept_layer_count(config, sizes.language), sizes.language)
    return replace(
        config,
        keep_layers=keep_layers,
        visual_tokens=None if config.visual_tokens is None else visual_tokens,
        key_tokens=key_tokens,
    )


def resolve_layers(config: CompileConfig, sizes: "LanguageSizes") -> int | tuple[int, ...] | None:
    """Return the budget of decoder layers with a share as a count.

    Raises:
        ValueError: the decoder has fewer layers; the message names values that fit.
    """
    keep, layers = config.keep_layers, sizes.layers
    if isinstance(keep, tuple):
        if keep[-1] >= layers:
            raise ValueError(f"keep_layers={keep}: the decoder has the layers 0 to {layers - 1}; name some of these")
        return keep
    if keep is None:
        return None
    if keep > layers:
        raise ValueError(f"keep_layers={keep}: the decoder has {layers} layers; {_fitting('keep_layers', layers)}")
    return _count(keep, layers)


def kept_layer_count(config: CompileConfig, sizes: "LanguageSizes") -> int:
    """Return how many of the decoder's layers stay.

    Raises:
        ValueError: the decoder has fewer; see `resolve_layers`.
    """
    keep = resolve_layers(config, sizes)
    if isinstance(keep, tuple):
        return len(keep)
    return sizes.layers if keep is None else keep


def kept_neurons(config: CompileConfig, width: int) -> int:
    """Return how many of an MLP's `width` neurons stay: the share, rounded to a multiple of 64, at least 64."""
    if config.mlp_keep == 1.0:
        return width
    return min(width, max(1, round(config.mlp_keep * width / NEURON_MULTIPLE)) * NEURON_MULTIPLE)


def resolve_tokens(config: CompileConfig, patches: int) -> tuple[int, int]:
    """Return how many of a frame's `patches` stay as visual tokens, all for None, and how many of these are key tokens.

    Raises:
        ValueError: there are fewer patches, or more key tokens than tokens; the message names values that fit.
    """
    key_tokens = _count(config.key_tokens, patches)
    if config.visual_tokens is None:
        return patches, key_tokens  # nothing is selected, so key tokens have no effect
    if config.visual_tokens > patches:
        raise ValueError(
            f"visual_tokens={config.visual_tokens}: the policy sees {patches} patches;"
            f" {_fitting('visual_tokens', patches)}"
        )
    visual_tokens = _count(config.visual_tokens, patches)
    check_key_tokens(visual_tokens, key_tokens)
    return visual_tokens, key_tokens


def _check_selection(visual_tokens: int, layers: int, sizes: "LanguageSizes") -> None:
    """Refuse a selection of visual tokens where the decoder offers no scores, or `layers` of it are too few."""
    everything = "visual_tokens=None (--visual-tokens all)"
    if sizes.kv_heads != sizes.heads:
        raise ValueError(
            f"visual_tokens={visual_tokens}: relevance is defined for as many key as query heads, and this decoder has"
            f" {sizes.kv_heads} and {sizes.heads}; use {everything}"
        )
    if layers < _FEWEST_LAYERS:
        more = f"keep_layers={_FEWEST_LAYERS} or more, or " if sizes.layers >= _FEWEST_LAYERS else ""
        raise ValueError(
            f"visual_tokens={visual_tokens} with {layers} decoder layers: selecting visual tokens needs two layers"
            f" below it and one above; use {more}{everything}"
        )


def _count(budget: int | Share, whole: int) -> int:
    """Return a budget as a count, at least 1: a share is rounded to the nearest one, a half to the even one."""
    return max(1, round(budget * whole)) if isinstance(budget, float) else budget


def _fitting(name: str, whole: int) -> str:
    """Return values of a budget that fit, in words: the paper's share among them, which fits every model."""
    share = getattr(CompileConfig(), name)
    return f"use {name}=1 to {whole}, or a share of them such as {name}={share:.2f}, which keeps {_count(share, whole)}"
