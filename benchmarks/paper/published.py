"""Parameters and operations that EfficientVLA (arXiv 2506.10100) printed, row by row, with each row's settings."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

from evla_compile.graph.flops import Component
from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.settings.sizes import PublishedName

EXTRA_TOKENS = 4
"""Visual tokens that the published rows keep beyond T."""

Unit: TypeAlias = Literal["M", "B", "GFLOP", "TFLOP", "%"]
"""Parameters in millions or billions; operations, or operations in percent of the base policy's."""

Quantity: TypeAlias = tuple[Component | Literal["total"], Unit]
"""What was counted, and the unit that it was printed in."""

Figures: TypeAlias = tuple[tuple[Quantity, str | None], ...]
"""Quantities and the published figures, as printed; None where only we count."""


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a published table."""

    table: int
    """Number of the table."""
    name: str
    """Name of the row."""
    config: CompileConfig
    """Its settings; `visual_tokens` is the paper's T."""
    figures: Figures
    """What was printed."""
    size: PublishedName = "base"
    """Which CogACT."""


def setting(
    *, layers: int | None = None, mlp_keep: float = 1.0, tokens: int | None = None, interval: int = 1
) -> CompileConfig:
    """Return the paper's method, keeping everything that is not named."""
    return replace(
        CompileConfig.preset("l22-t56"),
        keep_layers=layers,
        mlp_keep=mlp_keep,
        visual_tokens=tokens,
        cache_interval=interval,
        text_tokens=PAPER_TEXT_TOKENS,
    )


def efficient(layers: int, tokens: int) -> CompileConfig:
    """Return the settings of one of EfficientVLA's rows of Table 2."""
    return setting(layers=layers, mlp_keep=0.75, tokens=tokens, interval=5)


def _modules(name: str, config: CompileConfig, *columns: str) -> Iterator[Row]:
    for component, column in zip((*get_args(Component), "total"), columns, strict=True):
        millions, flops = column.split()
        yield Row(1, name, config, (((component, "M"), millions), ((component, "GFLOP"), flops)))


def _cost(share: str, billions: str) -> Figures:
    return (("total", "%"), share), (("total", "B"), billions)


def _parameters(billions: str) -> Figures:
    return ((("total", "B"), billions),)


def _operations(tera: str) -> Figures:
    return ((("total", "TFLOP"), tera),)


_ONE_STEP = replace(setting(), ddim_steps=1)
_ONE_STEP_CUT = replace(setting(layers=22, mlp_keep=0.75), ddim_steps=1)
_UNPUBLISHED: Figures = ((("total", "%"), None),)

PUBLISHED = (
    *_modules("CogACT", setting(), "802.3 405.50", "6738.9 3726.55", "89.0 57.96", "7630.2 4190.01"),
    *_modules("EfficientVLA", efficient(22, 56), "802.3 405.50", "3971.1 792.58", "89.0 11.72", "4862.4 1209.80"),
    Row(2, "CogACT", setting(), _cost("100.0", "7.63")),
    Row(2, "random dropping, T=112", setting(tokens=112), _cost("58.5", "7.63")),
    Row(2, "FastV, T=56", setting(tokens=56), _cost("42.0", "7.63")),
    Row(2, "EfficientVLA, L=28, T=112", efficient(28, 112), _cost("45.1", "5.87")),
    Row(2, "EfficientVLA, L=28, T=56", efficient(28, 56), _cost("32.9", "5.87")),
    Row(2, "EfficientVLA, L=22, T=112", efficient(22, 112), _cost("38.2", "4.86")),
    Row(2, "EfficientVLA, L=22, T=56", efficient(22, 56), _cost("28.9", "4.86")),
    # parameters depend neither on tokens nor on the cache nor on the denoising steps
    Row(3, "CogACT-Small", _ONE_STEP, _parameters("7.55"), "small"),
    Row(3, "CogACT-Base", setting(), _parameters("7.63"), "base"),
    Row(3, "CogACT-Large", _ONE_STEP, _parameters("7.85"), "large"),
    Row(3, "CogACT-Small, EfficientVLA", _ONE_STEP_CUT, _parameters("4.78"), "small"),
    Row(3, "CogACT-Base, EfficientVLA", efficient(22, 56), _parameters("4.86"), "base"),
    Row(3, "CogACT-Large, EfficientVLA", _ONE_STEP_CUT, _parameters("5.08"), "large"),
    Row(4, "tokens alone, T=56", setting(tokens=56), _operations("1.76")),
    Row(4, "tokens alone, T=72", setting(tokens=72), _operations("1.96")),
    Row(4, "tokens alone, T=96", setting(tokens=96), _operations("2.25")),
    Row(4, "tokens alone, T=112", setting(tokens=112), _operations("2.45")),
    Row(4, "tokens alone, T=256", setting(), _operations("4.19")),
    Row(4, "cache alone, N=1", setting(), _operations("4.190")),
    Row(4, "cache alone, N=2", setting(interval=2), _operations("4.161")),
    Row(4, "cache alone, N=3", setting(interval=3), _operations("4.155")),
    Row(4, "cache alone, N=4", setting(interval=4), _operations("4.150")),
    Row(4, "cache alone, N=5", setting(interval=5), _operations("4.144")),
    # in brackets what was published instead: seconds on an A40 and the speed-up
    Row(5, "Ex0: nothing (0.2342 s, 1.00x)", setting(), _UNPUBLISHED),
    Row(5, "Ex1: tokens (0.1866 s, 1.25x)", setting(tokens=56), _UNPUBLISHED),
    Row(5, "Ex2: cache (0.1909 s, 1.23x)", setting(interval=5), _UNPUBLISHED),
    Row(5, "Ex3: layers, tokens (0.1604 s, 1.46x)", setting(layers=22, tokens=56), _UNPUBLISHED),
    Row(5, "Ex4: layers, MLP (0.1638 s, 1.43x)", setting(layers=22, mlp_keep=0.75), _UNPUBLISHED),
    Row(5, "Ex5: layers, MLP, cache (0.1387 s, 1.69x)", replace(efficient(22, 56), visual_tokens=None), _UNPUBLISHED),
    Row(5, "Ex6: tokens, cache (0.1592 s, 1.47x)", setting(tokens=56, interval=5), _UNPUBLISHED),
    Row(5, "Ex7: everything (0.1213 s, 1.93x)", efficient(22, 56), _UNPUBLISHED),
)
"""Every row of Tables 1 to 5 that prints parameters or operations and that can be rebuilt, and Table 5's settings.

T counts the key tokens in, as the paper defines it. Random dropping and FastV are a selection of tokens alone, in which
tokens stay does not change counts. VLA-Cache's rows are left out.
"""
