"""What to compile: `CompileConfig` and the presets of the paper (EfficientVLA, arXiv 2506.10100, Table 2)."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Any, Self

from evla_compile.settings.budgets.budget import Budget, Decision, Measured, Measurement
from evla_compile.settings.budgets.cache import CacheBudget
from evla_compile.settings.budgets.layers import LayerBudget
from evla_compile.settings.budgets.mlp import MLPBudget
from evla_compile.settings.budgets.repair import RepairBudget, compressed
from evla_compile.settings.budgets.sampler import DenoisingSettings, SamplerBudget
from evla_compile.settings.budgets.tokens import TokenBudget
from evla_compile.settings.budgets.vision import VisionBudget
from evla_compile.settings.schedule import DDIM_STEPS
from evla_compile.settings.setting import KEPT, number_from, setting, settings_of, whole_from
from evla_compile.settings.sizes import ModelSizes

CFG_SCALE = 1.5
"""Guidance scale with which CogACT is evaluated."""

TEXT_TOKENS = 32
"""Text budget by default; SIMPLER's prompts have 20 to 26 tokens."""

PAPER_TEXT_TOKENS = 26
"""Text tokens for which the paper's FLOPs were counted: SIMPLER's longest prompt."""

OPSET = 23
"""ONNX opset written by default: the first with attention and RMS normalisation as single operators."""

check_cfg_scale = partial(number_from(1.0, 100.0), "cfg_scale")
"""Return a guidance scale as a float; ValueError where it is no number from 1 to 100."""

check_text_tokens = partial(whole_from(4, 2048), "text_tokens")
"""Return a text budget as an int; ValueError where it is no whole number from 4 to 2048."""


@dataclass(frozen=True, kw_only=True)
class CallSettings(DenoisingSettings):
    """Settings of every call of the compiled policy, whatever is kept of it."""

    cfg_scale: float = setting(
        CFG_SCALE, text="Classifier-free guidance; 1 for none.", read=lambda _, scale: check_cfg_scale(scale)
    )
    """Classifier-free guidance scale; 1.0 turns guidance off."""
    text_tokens: int = setting(
        TEXT_TOKENS, text="Text budget in tokens.", read=lambda _, budget: check_text_tokens(budget)
    )
    """Static text budget in tokens, BOS and the two appended ids included; shorter prompts are right-padded."""
    batch_size: int = setting(1, text="Static batch size.", read=whole_from(1, 1024))
    """Static batch size of the compiled graph."""


@dataclass(frozen=True, kw_only=True)
class CompileConfig(
    # Read from the last to the first, the order of the techniques in the pipeline and of the settings in JSON.
    CallSettings,
    CacheBudget,
    SamplerBudget,
    RepairBudget,
    TokenBudget,
    VisionBudget,
    MLPBudget,
    LayerBudget,
):
    """Budgets and sampler settings of one compilation.

    The defaults have the budgets of the paper's headline row (L=22, T=56, N=5), but keep the visual tokens that cover
    the image, merge the others into them, and repair what is left on the calibration frames. The paper's own method is
    the preset "l22-t56".

    Defaults and presets are shares, which give the paper's numbers on CogACT's sizes (32 layers, 256 patches) and fit
    other sizes as well; `resolve` turns them into numbers of a model, and refuses those that do not fit. Numbers of
    numpy's types, and a list, range or array of layer indices, become the plain values that the annotations name;
    shares of 1.0 become None.

    Raises:
        ValueError: a setting is out of its range; the message names it, its value and the legal range.
    """

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
        off = {name: about.off for name, about in settings_of(cls).items() if about.off is not KEPT}
        return cls(**off, ddim_steps=ddim_steps, cfg_scale=cfg_scale, text_tokens=text_tokens, batch_size=batch_size)

    @classmethod
    def preset(cls, name: str) -> "CompileConfig":
        """Return a configuration by its name, for instance "balanced", or a row of the paper, "l22-t56".

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
        settings, known = dict(data), settings_of(cls)
        unknown, missing = settings.keys() - known, known.keys() - settings
        if unknown or missing:
            raise ValueError(f"unknown compile settings {sorted(unknown)}, missing {sorted(missing)}")
        return cls(**settings)

    @classmethod
    def techniques(cls) -> tuple[type[Budget], ...]:
        """Return the budgets that the configuration is made of, in the order of the pipeline."""
        return tuple(base for base in reversed(cls.__mro__) if issubclass(base, Budget) and "decision" in vars(base))

    def budgets(self) -> tuple[Budget, ...]:
        """Return the budget of every technique, in the order of the pipeline."""
        return tuple(
            technique(**{each.name: getattr(self, each.name) for each in fields(technique)})
            for technique in self.techniques()
        )

    def resolve(self, sizes: ModelSizes) -> Self:
        """Return the configuration with counts for a model of these sizes in place of shares; None stays None.

        A configuration of counts is returned unchanged, so the method may be applied twice.

        Raises:
            ValueError: a budget does not fit the sizes; the message names the setting, its value and one that fits.
        """
        counts: dict[str, Any] = {}
        for budget in self.budgets():
            resolved = budget.resolve(sizes)
            counts |= {each.name: getattr(resolved, each.name) for each in fields(resolved)}
        found = replace(self, **counts)
        found.check(sizes, sizes)
        return found

    def left(self, sizes: ModelSizes) -> ModelSizes:
        """Return the sizes of the model behind all techniques, as far as these change them."""
        for budget in self.budgets():
            sizes = budget.left(sizes)
        return sizes

    def check(self, sizes: ModelSizes, left: ModelSizes) -> None:
        """Refuse budgets that do not go with each other on what is left of the model; see `Budget.check`."""
        for budget in self.budgets():
            budget.check(sizes, left)
            left = budget.left(left)

    def idle_settings(self) -> Mapping[str, str]:
        """Return the settings that decide nothing beside the others, and why."""
        found = {name: reason for budget in self.budgets() for name, reason in budget.idle_settings().items()}
        if self.vision_mlp_keep < 1.0:
            found.pop("repair_frames", None)  # a cut of the vision towers is refit on them whatever else is
        return found

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the settings, and their values, that leave open what stays, so that only measurements can tell.

        Raises:
            ValueError: a budget does not fit the sizes.
        """
        found = {name: value for budget in self.budgets() for name, value in budget.unmeasured(sizes).items()}
        if "repair" in found and not self._compresses(sizes):
            del found["repair"]
        return found

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return what calibration must measure for all decisions."""
        found: frozenset[Measurement] = frozenset().union(*(budget.measurements(sizes) for budget in self.budgets()))
        return found if self._compresses(sizes) else found - {"repair"}

    def _compresses(self, sizes: ModelSizes) -> bool:
        return compressed(self.decide(sizes, None), sizes)

    def decide(
        self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision] = ()
    ) -> tuple[Decision, ...]:
        """Return the decision of every technique, in the order of the pipeline; see `Budget.decide`.

        Raises:
            ValueError: a budget does not fit the sizes.
        """
        decisions = tuple(earlier)
        for budget in self.budgets():
            decisions += budget.decide(sizes, measured, decisions)
        return decisions[len(earlier) :]

    def complete(
        self, planned: Sequence[Decision], sizes: ModelSizes, earlier: Sequence[Decision] = ()
    ) -> tuple[Decision, ...]:
        """Return the decision of every technique, in the order of the pipeline; see `Budget.complete`."""
        decisions = tuple(earlier)
        for budget in self.budgets():
            decisions += budget.complete(planned, sizes, decisions)
        return decisions[len(earlier) :]

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse decisions that were made for other budgets or sizes; see `Budget.check_decision`."""
        for budget in self.budgets():
            budget.check_decision(decisions, sizes, measured=measured)


def _paper(layers: int, tokens: int) -> CompileConfig:
    """Return EfficientVLA's method with the budgets of a row of Table 2."""
    return CompileConfig(
        keep_layers=layers / 32,
        layer_rule="importance",
        mlp_keep=0.75,
        visual_tokens=tokens / 256,
        token_rule="relevance",
        merge_tokens=False,
        repair="none",
        cache_interval=5,
    )


PRESETS: Mapping[str, CompileConfig] = MappingProxyType(
    {f"l{layers}-t{tokens}": _paper(layers, tokens) for layers in (28, 22) for tokens in (112, 56)}
    | {
        "faithful": CompileConfig(keep_layers=28 / 32, visual_tokens=112 / 256),
        "balanced": CompileConfig(),
        "fast": CompileConfig(
            keep_layers=16 / 32,
            layer_rule="greedy",
            mlp_keep=0.25,
            vision_mlp_keep=0.25,
            repair="last",
            solver="dpm++",
            solver_steps=2,
            cache_interval=1,
        ),
    }
)
"""Configurations by name. `l28-t112`, `l28-t56`, `l22-t112` and `l22-t56` are EfficientVLA exactly, in the rows of its
Table 2 (all with MLP 0.75 and N=5). `faithful`, `balanced`, which is the default, and `fast` keep less and less with
this project's recipe: tokens that cover the image, merging, and repair; `fast` chooses layers greedily, cuts the
vision towers and takes two steps of DPM-Solver++ as well. The numbers are CogACT's, of 32 layers and 256
patches; other sizes keep the same shares."""
