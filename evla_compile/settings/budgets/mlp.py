"""How many neurons of the decoder's MLPs stay, and which (EfficientVLA section 4.1, Table 5); no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import (
    Budget,
    Decision,
    Measured,
    MeasuredDecision,
    Measurement,
    decision_of,
)
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.plan_values import ascending, from_runs, to_runs
from evla_compile.settings.budgets.shares import rounded_width
from evla_compile.settings.setting import number_from, setting
from evla_compile.settings.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class MLPDecision(MeasuredDecision):
    """The MLP neurons that stay."""

    keys: ClassVar[Mapping[str, Any]] = {"mlp_neurons": ...}

    neurons: tuple[tuple[int, tuple[int, ...]], ...] = ()
    """Pairs of a kept decoder layer and the ascending indices of its neurons that stay; empty where all stay."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether all neurons stay."""
        del sizes
        return not self.neurons

    def to_json(self) -> dict[str, Any]:
        """Return the neurons of each kept layer as runs of indices, "0-3,5,7-20"."""
        return {"mlp_neurons": [to_runs(kept) for _, kept in self.neurons]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        layers, runs = decision_of(LayerDecision, earlier).keep, data["mlp_neurons"]
        # counted before they are expanded: a plan may come from anywhere, and "0-999999" is soon repeated
        if len(runs) not in (0, len(layers)):
            raise ValueError(f"neurons of {len(runs)} layers for {len(layers)} kept layers")
        return cls(neurons=tuple((layer, from_runs(text)) for layer, text in zip(layers, runs, strict=False)))


@dataclass(frozen=True, kw_only=True)
class MLPBudget(Budget):
    """Neurons of every kept layer's MLP to keep."""

    decision: ClassVar[type[Decision]] = MLPDecision

    mlp_keep: float = setting(
        0.75,
        text="Share of each kept MLP's neurons kept.",
        read=number_from(0.0, 1.0, low_open=True),
        off=1.0,
    )
    """Share of every kept layer's MLP neurons that stays, rounded to a multiple of 64 neurons; 1.0 for all."""

    def kept_neurons(self, width: int) -> int:
        """Return how many of an MLP's `width` neurons stay: the share, rounded to a multiple of 64, at least 64."""
        return rounded_width(self.mlp_keep, width)

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the share where it is not all of them."""
        width = sizes.language.mlp_width
        return {"mlp_keep": self.mlp_keep} if self.kept_neurons(width) < width else {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return the neurons' scores, where some go."""
        return frozenset({"neuron_scores"}) if MLPBudget.unmeasured(self, sizes) else frozenset()

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the neurons of the highest score in each kept layer; the first ones where nothing was measured."""
        width = sizes.language.mlp_width
        count, layers = self.kept_neurons(width), decision_of(LayerDecision, earlier).keep
        if count == width:
            return (MLPDecision(),)
        if measured is None:
            return (MLPDecision(neurons=tuple((layer, tuple(range(count))) for layer in layers)),)
        return (MLPDecision(neurons=tuple((layer, highest(measured.neuron_scores[layer], count)) for layer in layers)),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse another number of neurons, or neurons that the decoder lacks; see `Budget.check_decision`."""
        neurons, layers = decision_of(MLPDecision, decisions).neurons, decision_of(LayerDecision, decisions).keep
        width = sizes.language.mlp_width
        count = self.kept_neurons(width)
        found = sorted({len(kept) for _, kept in neurons})
        expected = [] if count == width else [count]
        if found != expected or (expected and tuple(layer for layer, _ in neurons) != layers):
            raise CalibrationError(
                f"the plan keeps {found or 'all'} MLP neurons in layers {tuple(layer for layer, _ in neurons)}, the"
                f" settings ask for {expected or 'all'} (mlp_keep={self.mlp_keep}) in {layers}"
            )
        for layer, kept in neurons:
            try:
                ascending(kept)
            except ValueError as error:
                raise CalibrationError(f"the plan's MLP neurons of layer {layer}: {error}") from error
            if kept[-1] >= width:
                raise CalibrationError(f"the plan names an MLP neuron beyond the decoder's {width}")


def highest(scores: NDArray[np.float32], count: int) -> tuple[int, ...]:
    """Return the places of the `count` highest scores, ascending; the lower one stays among equals.

    Args:
        scores: float32 [M].
        count: how many, up to M.
    """
    ranked = np.argsort(-scores, kind="stable")[:count]
    return tuple(sorted(ranked.tolist()))
