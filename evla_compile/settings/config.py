"""What to compile: `CompileConfig` and the presets of the paper (EfficientVLA, arXiv 2506.10100, Table 2)."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Any, Literal, Self, TypeAlias, get_args

from evla_compile.arguments import is_listed, is_real, is_whole, number, whole_number

DIFFUSION_STEPS = 100
"""Length of the training noise schedule of every published CogACT (T in the paper)."""

VALID_DDIM_STEPS = tuple(
    steps
    for steps in range(1, DIFFUSION_STEPS + 1)
    if any(-(-DIFFUSION_STEPS // stride) == steps for stride in range(1, DIFFUSION_STEPS + 1))
)
"""Step counts that some integer stride over the schedule yields."""


DDIM_STEPS = 10
"""Denoising steps with which CogACT is evaluated."""

CFG_SCALE = 1.5
"""Guidance scale with which CogACT is evaluated."""

TEXT_TOKENS = 32
"""Text budget by default; SIMPLER's prompts have 20 to 26 tokens."""

PAPER_TEXT_TOKENS = 26
"""Text tokens for which the paper's FLOPs were counted: SIMPLER's longest prompt."""

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Dtype of the weights and matrix products of vision, projector and decoder in an exported file."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""All values of `Precision`."""

LayerRule: TypeAlias = Literal["importance", "greedy"]
"""How calibration chooses the decoder layers that stay."""

LAYER_RULES: tuple[LayerRule, ...] = get_args(LayerRule)
"""All values of `LayerRule`."""

Share: TypeAlias = float
"""A budget as a share of what the model has, above 0.0 and below 1.0. An int is a count instead, so 1 is one layer; 1.0
keeps everything, like None, where that is possible."""

OPSET = 23
"""ONNX opset written by default: the first with attention and RMS normalisation as single operators."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileConfig:
    """Budgets and sampler settings of one compilation; the defaults are the paper's headline row (L=22, T=56, N=5).

    Defaults and presets are shares, which give the paper's numbers on CogACT's sizes (32 layers, 256 patches) and fit
    other sizes as well. `settings.budgets` turns them into numbers of a model, and refuses those that do not fit.
    Numbers of numpy's types, and a list, range or array of layer indices, become the plain values that the annotations
    name; shares of 1.0 become None.

    Raises:
        ValueError: a setting is out of its range; the message names it, its value and the legal range.
    """

    keep_layers: int | Share | tuple[int, ...] | None = 22 / 32
    """Decoder layers kept (the paper's L): a count or a share of all, for calibration to place; ascending indices; None
    for all."""
    layer_rule: LayerRule = "importance"
    """Which layers go where `keep_layers` names none: those of least "importance", by the paper's equation 1; or
    "greedy", not in the paper: one after the other, that without which the cognition feature moves least."""
    mlp_keep: float = 0.75
    """Share of every kept layer's MLP neurons that stays, rounded to a multiple of 64 neurons; 1.0 for all."""
    visual_tokens: int | Share | None = 56 / 256
    """Visual tokens kept after the second kept decoder layer (the paper's T), key tokens included: a count or a share
    of the patches; None for all."""
    key_tokens: int | Share = 4 / 256
    """Visual tokens always kept for their relevance to the instruction (the paper's K_key): a count or a share of the
    patches."""
    task_share: float = 0.5
    """Share of the remaining visual budget given by relevance rather than by diversity (the paper's alpha)."""
    cache_interval: int = 5
    """Denoising steps between two recomputations of the DiT's blocks (the paper's N); 1 recomputes always."""
    ddim_steps: int = DDIM_STEPS
    """Denoising steps of the DDIM sampler (eta 0); only counts that an integer stride over 100 yields."""
    cfg_scale: float = CFG_SCALE
    """Classifier-free guidance scale; 1.0 turns guidance off."""
    text_tokens: int = TEXT_TOKENS
    """Static text budget in tokens, BOS and the two appended ids included; shorter prompts are right-padded."""
    batch_size: int = 1
    """Static batch size of the compiled graph."""

    def __post_init__(self) -> None:
        if self.layer_rule not in LAYER_RULES:
            raise ValueError(f"layer_rule={self.layer_rule!r}: expected one of {', '.join(LAYER_RULES)}")
        plain: dict[str, Any] = {
            "keep_layers": _layers(self.keep_layers),
            "mlp_keep": number("mlp_keep", self.mlp_keep, low=0.0, high=1.0, low_open=True),
            "task_share": number("task_share", self.task_share, low=0.0, high=1.0),
            "cfg_scale": check_cfg_scale(self.cfg_scale),
            "visual_tokens": _count_or_share_or_all("visual_tokens", self.visual_tokens),
            "key_tokens": _count_or_share("key_tokens", self.key_tokens),
            "cache_interval": whole_number("cache_interval", self.cache_interval, low=1, high=DIFFUSION_STEPS),
            "text_tokens": check_text_tokens(self.text_tokens),
            "batch_size": whole_number("batch_size", self.batch_size, low=1, high=1024),
            "ddim_steps": check_ddim_steps(self.ddim_steps),
        }
        for name, value in plain.items():
            object.__setattr__(self, name, value)
        if type(self.visual_tokens) is type(self.key_tokens):  # else the model decides
            check_key_tokens(self.visual_tokens, self.key_tokens)

    @classmethod
    def dense(
        cls,
        *,
        ddim_steps: int = DDIM_STEPS,
        cfg_scale: float = CFG_SCALE,
        text_tokens: int = TEXT_TOKENS,
        batch_size: int = 1,
    ) -> Self:
        """Return a configuration that keeps everything: only the exact rewrites are applied."""
        return cls(
            keep_layers=None,
            mlp_keep=1.0,
            visual_tokens=None,
            cache_interval=1,
            ddim_steps=ddim_steps,
            cfg_scale=cfg_scale,
            text_tokens=text_tokens,
            batch_size=batch_size,
        )

    @classmethod
    def preset(cls, name: str) -> "CompileConfig":
        """Return a row of the paper's Table 2 by its name, for instance "l22-t56".

        Raises:
            ValueError: no such preset; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}; expected one of {', '.join(sorted(PRESETS))}")
        return PRESETS[name]

    def to_json(self) -> dict[str, Any]:
        """Return the settings as JSON-ready values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            ValueError: a setting is missing, unknown or out of range.
        """
        settings = dict(data)
        unknown, missing = settings.keys() - cls.__dataclass_fields__, cls.__dataclass_fields__.keys() - settings
        if unknown or missing:
            raise ValueError(f"unknown compile settings {sorted(unknown)}, missing {sorted(missing)}")
        return cls(**settings)


def check_ddim_steps(steps: object) -> int:
    """Return a number of denoising steps as an int, if an integer stride over the schedule yields it.

    Raises:
        ValueError: none does; the message lists the valid counts.
    """
    if not is_whole(steps) or steps not in VALID_DDIM_STEPS:
        valid = ", ".join(map(str, VALID_DDIM_STEPS))
        raise ValueError(f"ddim_steps={steps!r} has no integer stride over {DIFFUSION_STEPS} steps; valid: {valid}")
    return int(steps)


def check_cfg_scale(scale: object) -> float:
    """Return a guidance scale as a float.

    Raises:
        ValueError: it is no number from 1 to 100.
    """
    return number("cfg_scale", scale, low=1.0, high=100.0)


def check_text_tokens(budget: object) -> int:
    """Return a text budget as an int.

    Raises:
        ValueError: it is no whole number from 4 to 2048.
    """
    return whole_number("text_tokens", budget, low=4, high=2048)


def check_key_tokens(visual_tokens: int | Share, key_tokens: int | Share) -> None:
    """Refuse a budget of visual tokens that its key tokens alone exceed, both counts or both shares.

    Raises:
        ValueError: the message names both settings and a value that fits.
    """
    if visual_tokens < key_tokens:
        raise ValueError(
            f"visual_tokens={visual_tokens} is below key_tokens={key_tokens}: the key tokens count towards the budget;"
            f" use visual_tokens={key_tokens} or more, or key_tokens={visual_tokens} or less"
        )


def _layers(keep: object) -> int | Share | tuple[int, ...] | None:
    """Return a budget of decoder layers as a plain value; a refusal names what is wrong with it."""
    if not is_listed(keep):
        return _count_or_share_or_all("keep_layers", keep)
    if not len(keep) or any(not is_whole(index) or index < 0 for index in keep):
        raise ValueError(f"keep_layers={keep!r}: expected layer indices from 0, at least one")
    indices = tuple(int(index) for index in keep)
    if any(a >= b for a, b in pairwise(indices)):
        raise ValueError(f"keep_layers={keep!r}: indices must ascend without repeats, as in (0, 1, 4)")
    return indices


def _count_or_share_or_all(name: str, budget: object) -> int | Share | None:
    """Return a budget as a plain value: None and the share 1.0, which would equal one as a count, both as None."""
    whole_share = is_real(budget) and not is_whole(budget) and budget == 1.0
    return None if budget is None or whole_share else _count_or_share(name, budget)


def _count_or_share(name: str, budget: object) -> int | Share:
    """Return a budget as an int where it is a count, as a float where it is a share."""
    if is_whole(budget) and budget >= 1:
        return int(budget)
    if is_real(budget) and not is_whole(budget) and 0.0 < budget < 1.0:
        return float(budget)
    count = f"; as a count, write {budget:.0f}" if isinstance(budget, float) and budget in range(1, 10_000) else ""
    raise ValueError(f"{name}={budget!r}: expected a count from 1 up, or a share above 0.0 and below 1.0{count}")


PRESETS: Mapping[str, CompileConfig] = MappingProxyType(
    {
        f"l{layers}-t{tokens}": CompileConfig(keep_layers=layers / 32, visual_tokens=tokens / 256)
        for layers in (28, 22)
        for tokens in (112, 56)
    }
)
"""EfficientVLA's rows of Table 2 by name: `l28-t112`, `l28-t56`, `l22-t112`, `l22-t56` (all with MLP 0.75 and N=5). The
numbers are CogACT's, of 32 layers and 256 patches; other sizes keep the same shares."""
