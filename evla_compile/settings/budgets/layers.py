"""How many decoder layers stay, and which (EfficientVLA section 3.2); no torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

from evla_compile.arguments import is_listed, is_whole
from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import (
    Budget,
    Decision,
    Measured,
    MeasuredDecision,
    Measurement,
    decision_of,
)
from evla_compile.settings.budgets.plan_values import ascending, index, score
from evla_compile.settings.budgets.shares import (
    Share,
    count_of,
    fitting,
    parse_count_share_or_all,
    read_count_share_or_all,
)
from evla_compile.settings.setting import one_of, setting
from evla_compile.settings.sizes import ModelSizes

LayerRule: TypeAlias = Literal["importance", "greedy"]
"""How calibration chooses the decoder layers that stay."""

LAYER_RULES: tuple[LayerRule, ...] = get_args(LayerRule)
"""All values of `LayerRule`."""

_PAPER_SHARE = 22 / 32
_MAX_LAYERS = 256  # beyond any decoder; a plan may come from anywhere


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerDecision(MeasuredDecision):
    """The decoder layers that stay."""

    keys: ClassVar[Mapping[str, Any]] = {"layer_importance": ..., "keep_layers": ..., "layer_rule": None}

    keep: tuple[int, ...]
    """Decoder layers kept, ascending."""
    importance: tuple[float, ...] = ()
    """I(l) of every layer of the unpruned decoder; empty if not measured."""
    rule: LayerRule | None = None
    """Rule that chose `keep`; None where all stay, or where they were named."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether all layers stay."""
        return len(self.keep) >= sizes.language.layers

    def to_json(self) -> dict[str, Any]:
        """Return the layers, their importance, and the rule."""
        return {"layer_importance": self.importance, "keep_layers": self.keep, "layer_rule": self.rule}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        keep = ascending([index(value) for value in data["keep_layers"]])
        if len(keep) > _MAX_LAYERS:
            raise ValueError(f"{len(keep)} kept layers: expected at most {_MAX_LAYERS}")
        return cls(
            keep=keep,
            importance=tuple(score(value) for value in data["layer_importance"]),
            rule=_rule(data["layer_rule"]),
        )


def _read_layers(name: str, keep: Any) -> int | Share | tuple[int, ...] | None:
    """Return a budget of decoder layers as a plain value; a refusal names what is wrong with it."""
    if not is_listed(keep):
        return read_count_share_or_all(name, keep)
    if not len(keep) or any(not is_whole(index) or index < 0 for index in keep):
        raise ValueError(f"{name}={keep!r}: expected layer indices from 0, at least one")
    indices = tuple(int(index) for index in keep)
    if any(a >= b for a, b in pairwise(indices)):
        raise ValueError(f"{name}={keep!r}: indices must ascend without repeats, as in (0, 1, 4)")
    return indices


def _parse_layers(text: str) -> int | Share | tuple[int, ...] | None:
    return tuple(int(index) for index in text.split(",")) if "," in text else parse_count_share_or_all(text)


@dataclass(frozen=True, kw_only=True)
class LayerBudget(Budget):
    """Decoder layers to keep, and the rule that places them."""

    decision: ClassVar[type[Decision]] = LayerDecision

    keep_layers: int | Share | tuple[int, ...] | None = setting(
        _PAPER_SHARE,
        text="Decoder layers kept.",
        read=_read_layers,
        off=None,
        parse=_parse_layers,
        metavar="N|SHARE|i,j,k|all",
        forms="a count as in 22, a share as in 0.69, indices as in 0,1,4, or all",
    )
    """Decoder layers kept (the paper's L): a count or a share of all, for calibration to place; ascending indices; None
    for all."""
    layer_rule: LayerRule = setting(
        "importance",
        text="Which layers go: the paper's importance, or one after the other.",
        read=one_of(LAYER_RULES),
    )
    """Which layers go where `keep_layers` names none: those of least "importance", by the paper's equation 1; or
    "greedy", not in the paper: one after the other, that without which the cognition feature moves least."""

    def resolve(self, sizes: ModelSizes) -> Self:
        """Return the budget with a share of layers as a count; see `Budget.resolve`."""
        keep, layers = self.keep_layers, sizes.language.layers
        if isinstance(keep, tuple):
            if keep[-1] >= layers:
                raise ValueError(
                    f"keep_layers={keep}: the decoder has the layers 0 to {layers - 1}; name some of these"
                )
            return self
        if keep is None:
            return self
        if keep > layers:
            fits = fitting("keep_layers", _PAPER_SHARE, layers)
            raise ValueError(f"keep_layers={keep}: the decoder has {layers} layers; {fits}")
        return replace(self, keep_layers=count_of(keep, layers))

    def kept_layer_count(self, sizes: ModelSizes) -> int:
        """Return how many of the decoder's layers stay.

        Raises:
            ValueError: the decoder has fewer.
        """
        keep = LayerBudget.resolve(self, sizes).keep_layers
        if isinstance(keep, tuple):
            return len(keep)
        return sizes.language.layers if keep is None else count_of(keep, sizes.language.layers)

    def left(self, sizes: ModelSizes) -> ModelSizes:
        """Return the sizes with the kept layers alone."""
        return replace(sizes, language=replace(sizes.language, layers=self.kept_layer_count(sizes)))

    def idle_settings(self) -> Mapping[str, str]:
        """Return the rule where it has no layers to choose."""
        if self.keep_layers is None or isinstance(self.keep_layers, tuple):
            return {"layer_rule": "no layer is left to a rule; give --keep-layers a count"}
        return {}

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return a count of layers that is not all of them."""
        return {"keep_layers": self.keep_layers} if self._counted(sizes) else {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return what the rule needs; the importance is always measured, for the plan to tell it."""
        if self._counted(sizes) and self.layer_rule == "greedy":
            return frozenset({"layer_importance", "feature_shift"})
        return frozenset({"layer_importance"})

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the layers that are named, else those of the rule; the first ones where nothing was measured."""
        count, layers = self.kept_layer_count(sizes), sizes.language.layers
        importance = measured.layer_importance if measured is not None else ()
        if isinstance(self.keep_layers, tuple):
            return (LayerDecision(keep=self.keep_layers, importance=importance),)
        if measured is None or count == layers:
            return (LayerDecision(keep=tuple(range(count)), importance=importance),)
        if self.layer_rule == "greedy" and measured.feature_shift is not None:
            keep = drop_one_by_one(layers, count, measured.feature_shift)
        else:
            keep = most_important(importance, count)
        return (LayerDecision(keep=keep, importance=importance, rule=self.layer_rule),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse other layers, another number of them, or another rule; see `Budget.check_decision`."""
        found, language = decision_of(LayerDecision, decisions), sizes.language
        kept, wanted = LayerBudget.resolve(self, sizes).keep_layers, self.kept_layer_count(sizes)
        out_of_order = any(a >= b for a, b in pairwise(found.keep))
        if len(found.keep) != wanted or (isinstance(kept, tuple) and kept != found.keep) or out_of_order:
            raise CalibrationError(
                f"the plan keeps the layers {found.keep}, the settings ask for keep_layers={kept} in ascending order"
            )
        if found.keep[-1] >= language.layers:
            raise CalibrationError(f"the plan keeps layer {found.keep[-1]}, the decoder has {language.layers} layers")
        # a plan without frames stands for any rule: nothing was chosen, see `stand_in_plan`
        if measured and self._counted(sizes) and found.rule != self.layer_rule:
            chosen = "were named" if found.rule is None else f"were chosen by layer_rule={found.rule!r}"
            raise CalibrationError(
                f"the plan's layers {chosen}, the settings ask for layer_rule={self.layer_rule!r}: calibrate again with"
                f" these settings, set the plan's rule, or name its layers, keep_layers={found.keep}"
            )

    def _counted(self, sizes: ModelSizes) -> bool:
        """Tell whether a rule has layers to choose."""
        kept = self.kept_layer_count(sizes)  # refuses layers that the decoder lacks, named ones too
        return not isinstance(self.keep_layers, tuple) and kept < sizes.language.layers


def most_important(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the `count` layers that stay, ascending: the least important go, the lower index first among equals."""
    ranked = sorted(range(len(importance)), key=lambda layer: (importance[layer], layer))
    return tuple(sorted(ranked[len(importance) - count :]))


def drop_one_by_one(layers: int, count: int, shift: Callable[[tuple[int, ...], int], float]) -> tuple[int, ...]:
    """Return the `count` layers that stay, ascending, where one goes after the other.

    Each time that one goes without which the feature moves least, the lower index among equals.

    Args:
        layers: layers that there are.
        count: layers to keep.
        shift: how far the feature moves with certain layers but for one of them.
    """
    keep = tuple(range(layers))
    while len(keep) > count:
        shifts = {gone: shift(keep, gone) for gone in keep}
        least = min(keep, key=lambda gone: shifts[gone])
        keep = tuple(layer for layer in keep if layer != least)
    return keep


def drop_trials(layers: int, count: int) -> int:
    """Return how often `drop_one_by_one` measures."""
    return sum(range(count + 1, layers + 1))


def _rule(value: object) -> LayerRule | None:
    rule: LayerRule | None = next((rule for rule in LAYER_RULES if rule == value), None)
    if rule is None and value is not None:
        raise ValueError(f"layer_rule {value!r:.40}: expected one of {', '.join(LAYER_RULES)}, or null")
    return rule
