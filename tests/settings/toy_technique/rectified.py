"""How many decoder layers compute a ReLU in their MLP, in place of a SiLU, and which; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

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
from evla_compile.settings.budgets.plan_values import ascending, index
from evla_compile.settings.setting import setting, whole_from
from evla_compile.settings.sizes import ModelSizes


@dataclass(frozen=True, kw_only=True, slots=True)
class RectifiedDecision(MeasuredDecision):
    """The decoder layers whose MLP is rectified."""

    keys: ClassVar[Mapping[str, Any]] = {"relu_layers": ()}

    layers: tuple[int, ...] = ()
    """Their indices, ascending; empty for none."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether every layer keeps its SiLU."""
        del sizes
        return not self.layers

    def to_json(self) -> dict[str, Any]:
        """Return the layers; nothing where there are none, so that such plans are written as before."""
        return {"relu_layers": self.layers} if self.layers else {}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        del earlier
        layers = [index(value) for value in data["relu_layers"]]
        return cls(layers=ascending(layers) if layers else ())


@dataclass(frozen=True, kw_only=True)
class RectifiedBudget(Budget):
    """Decoder layers to rectify."""

    decision: ClassVar[type[Decision]] = RectifiedDecision

    relu_layers: int = setting(0, text="Decoder layers whose MLP computes a ReLU.", read=whole_from(0, 256), off=0)
    """Kept decoder layers whose MLP computes a ReLU in place of its SiLU: those of least importance; 0 for none."""

    def check(self, sizes: ModelSizes, left: ModelSizes) -> None:
        """Refuse more layers than stay; see `Budget.check`."""
        layers = left.language.layers
        if self.relu_layers > layers:
            raise ValueError(f"relu_layers={self.relu_layers}: {layers} decoder layers stay; use 0 to {layers}")

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the count, where there is one."""
        return {"relu_layers": self.relu_layers} if self.relu_layers else {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return the layers' importance, which ranks them."""
        return frozenset({"layer_importance"}) if self.relu_layers else frozenset()

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the kept layers of least importance; the first ones where nothing was measured."""
        kept = decision_of(LayerDecision, earlier).keep
        if measured is not None:
            kept = tuple(sorted(kept, key=lambda layer: (measured.layer_importance[layer], layer)))
        return (RectifiedDecision(layers=tuple(sorted(kept[: self.relu_layers]))),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse another number of layers, or layers that do not stay; see `Budget.check_decision`."""
        layers, kept = decision_of(RectifiedDecision, decisions).layers, decision_of(LayerDecision, decisions).keep
        if len(layers) != self.relu_layers or not set(layers) <= set(kept):
            raise CalibrationError(
                f"the plan rectifies the layers {layers} of {kept}, the settings ask for relu_layers={self.relu_layers}"
            )
