"""The policies to compare: their sizes, and the rows of the table, chosen by name or by group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, TypeAlias

from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.settings.sizes import ActionSizes, LanguageSizes, ModelSizes, TowerSizes, published_sizes

_PAPER = CompileConfig.preset("l22-t56")

DtypeName: TypeAlias = Literal["float32", "bfloat16"]
"""Dtype of the vision towers, the projector and the decoder; the action head is float32 throughout."""

MID_SIZES = ModelSizes(
    dino=TowerSizes(
        width=256, depth=11, heads=4, mlp_width=1024, patches=256, class_tokens=1, register_tokens=4, layer_scale=True
    ),
    siglip=TowerSizes(width=288, depth=11, heads=4, mlp_width=1076, patches=256),
    projector=(544, 2176, 1024, 1024),
    language=LanguageSizes(width=1024, layers=16, heads=8, kv_heads=8, mlp_width=2752, vocabulary=32064),
    action=ActionSizes(
        width=192, depth=6, heads=4, mlp_width=768, condition_width=1024, frequencies=256, chunk=16, action_width=7
    ),
)
"""CogACT-Base at a quarter of the width, for CPUs: vision and action head have the same shares of the FLOPs."""

DEMO_SIZES = ModelSizes(
    dino=TowerSizes(
        width=192, depth=4, heads=3, mlp_width=768, patches=256, class_tokens=1, register_tokens=4, layer_scale=True
    ),
    siglip=TowerSizes(width=192, depth=4, heads=3, mlp_width=720, patches=256),
    projector=(384, 768, 256, 256),
    language=LanguageSizes(width=256, layers=12, heads=4, kv_heads=4, mlp_width=1024, vocabulary=32064),
    action=ActionSizes(
        width=192, depth=4, heads=4, mlp_width=768, condition_width=256, frequencies=256, chunk=16, action_width=7
    ),
)
"""The smallest that has CogACT's frame, patches, vocabulary and action chunk."""

SIZES: Mapping[str, ModelSizes] = MappingProxyType(
    {
        "small": published_sizes("small"),
        "base": published_sizes("base"),
        "large": published_sizes("large"),
        "mid": MID_SIZES,
        "demo": DEMO_SIZES,
    }
)
"""Policies by name: the published ones, and two for CPUs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One policy of the table."""

    names: tuple[str, ...]
    """Its names: the first is the main one, the others are rows of the paper that are the same policy."""
    groups: tuple[str, ...]
    """Groups that it belongs to."""
    dtype: DtypeName
    """Dtype of its weights, the action head's excepted."""
    computes_in: DtypeName
    """Dtype of its products, the action head's excepted: with autocast they are bfloat16 for weights of any dtype."""
    config: CompileConfig | None
    """How it is compiled; None for the policy as upstream runs it."""

    @property
    def label(self) -> str:
        """The names as they are shown."""
        return self.names[0] + (f" ({', '.join(self.names[1:])})" if self.names[1:] else "")


def make_rows(sizes: ModelSizes, *, dtype: DtypeName, device: str) -> tuple[Row, ...]:
    """Return every row of a policy, the baseline first.

    Budgets are the paper's, and in the group "recipes" those of this project's presets; layers are scaled in
    proportion to the decoder's 32, visual tokens to the frame's 256.

    Args:
        sizes: sizes of the policy.
        dtype: what the compiled rows compute in.
        device: "cpu" or "cuda". Upstream keeps float32 weights there, under bfloat16 autocast on CUDA alone, where its
            option of bfloat16 weights makes a second row.
    """
    layers = {paper: max(1, round(paper * sizes.language.layers / 32)) for paper in (28, 22)}
    tokens = {paper: max(1, round(paper * sizes.patches / 256)) for paper in (112, 56)}
    few, less, least = layers[28], layers[22], tokens[56]
    budgets: list[tuple[tuple[str, ...], tuple[str, ...], CompileConfig]] = [
        (("dense",), ("dense",), CompileConfig.dense(text_tokens=PAPER_TEXT_TOKENS)),
        ((f"layers-{few}",), ("passes",), _budget(keep_layers=few)),
        ((f"layers-{less}",), ("passes",), _budget(keep_layers=less)),
        (("mlp-0.75",), ("passes",), _budget(mlp_keep=0.75)),
        ((f"tokens-{tokens[112]}",), ("passes",), _budget(visual_tokens=tokens[112])),
        ((f"tokens-{least}", "ex1"), ("passes", "ablation"), _budget(visual_tokens=least)),
        (("cache-5", "ex2"), ("passes", "ablation"), _budget(cache_interval=5)),
        (("ex3",), ("ablation",), _budget(keep_layers=less, visual_tokens=least)),
        (("ex4",), ("ablation",), _budget(keep_layers=less, mlp_keep=0.75)),
        (("ex5",), ("ablation",), _budget(keep_layers=less, mlp_keep=0.75, cache_interval=5)),
        (("ex6",), ("ablation",), _budget(visual_tokens=least, cache_interval=5)),
    ]
    for kept in layers.values():
        for selected in tokens.values():
            strongest = (kept, selected) == (less, least)
            name, config = f"l{kept}-t{selected}", _budget(kept, 0.75, selected, 5)
            budgets.append(
                ((name, "ex7"), ("presets", "ablation"), config) if strongest else ((name,), ("presets",), config)
            )
    budgets += [
        ((name,), ("recipes",), replace(CompileConfig.preset(name), text_tokens=PAPER_TEXT_TOKENS))
        for name in ("faithful", "balanced", "fast")
    ]
    weights: list[DtypeName] = ["float32", "bfloat16"] if device == "cuda" and dtype == "bfloat16" else ["float32"]
    autocast: DtypeName = "bfloat16" if device == "cuda" else "float32"
    upstream = [
        Row(names=(f"upstream-{kind}",), groups=("upstream",), dtype=kind, computes_in=autocast, config=None)
        for kind in weights
    ]
    compiled = [
        Row(names=names, groups=groups, dtype=dtype, computes_in=dtype, config=config)
        for names, groups, config in budgets
    ]
    return (*upstream, *compiled)


def select_rows(rows: Sequence[Row], wanted: Sequence[str]) -> tuple[Row, ...]:
    """Return the rows that a name or group asks for, each once, in the order of `rows`; "all" asks for all.

    Raises:
        ValueError: a name is no row's; the message lists the names and groups.
    """
    names = [name for row in rows for name in row.names]
    groups = list(dict.fromkeys(group for row in rows for group in row.groups))
    unknown = [name for name in wanted if name not in (*names, *groups, "all")]
    if unknown or not wanted:
        raise ValueError(
            f"rows {unknown or 'not given'}: expected groups among {', '.join([*groups, 'all'])}, or names among"
            f" {', '.join(names)}"
        )
    return tuple(row for row in rows if {"all", *row.names, *row.groups}.intersection(wanted))


def _budget(
    keep_layers: int | None = None,
    mlp_keep: float = 1.0,
    visual_tokens: int | None = None,
    cache_interval: int = 1,
) -> CompileConfig:
    """Return the paper's method, keeping everything that is not named."""
    return replace(
        _PAPER,
        keep_layers=keep_layers,
        mlp_keep=mlp_keep,
        visual_tokens=visual_tokens,
        key_tokens=_PAPER.key_tokens if visual_tokens is None else min(4, visual_tokens),
        cache_interval=cache_interval,
        text_tokens=PAPER_TEXT_TOKENS,
    )
