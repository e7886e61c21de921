"""What every lossy technique is to the rest of the compiler: a budget, measurements, a decision; no torch."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from evla_compile.settings.setting import Settings
from evla_compile.settings.sizes import ModelSizes

Measurement: TypeAlias = Literal[
    "layer_importance", "neuron_scores", "feature_shift", "vision", "repair", "solver_shift", "cache_shift"
]
"""Name of a field of `Measured`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What calibration measured on the dense policy; a field that no budget asked for is empty."""

    layer_importance: tuple[float, ...] = ()
    """I(l) = 1 - mean cosine between input and output of every decoder layer (EfficientVLA's equation 1)."""
    neuron_scores: tuple[NDArray[np.float32], ...] = ()
    """Score of every MLP neuron of every decoder layer, float32 [M] each: the mean over tokens of |silu(gate) up| times
    the norm of its column of the down projection."""
    feature_shift: Callable[[tuple[int, ...], int], float] | None = None
    """Measures, when it is called with decoder layers and one of them, how far the cognition feature f moves with these
    layers but for that one: the mean over frames of |f - f_dense| / |f_dense|."""
    vision: Callable[[Mapping[str, int]], "Decision"] | None = None
    """Cuts the MLPs of the vision towers, when it is called with how many neurons stay in each by its module path, and
    returns its decision."""
    repair: Callable[[Sequence["Decision"]], "Decision"] | None = None
    """Repairs, when it is called with the decisions of the techniques in front, and returns its own decision."""
    solver_shift: Callable[[tuple[int, ...]], float] | None = None
    """Measures, when it is called, how far actions a of the solver at these timesteps are from those of DDIM: the mean
    over frames of |a - a_ddim|, over the mean of |a_ddim|."""
    cache_shift: Callable[[tuple[int, ...]], float] | None = None
    """Measures, when it is called, how far actions a move where these denoising steps alone compute, likewise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision(ABC):
    """What a technique does to a model of certain sizes: the settings of its pass."""

    @abstractmethod
    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether it leaves a model of these sizes as it is, so that no pass is needed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasuredDecision(Decision):
    """A decision that rests on measurements, in a plan; without arguments it is idle, the layers' excepted."""

    keys: ClassVar[Mapping[str, Any]]
    """Keys of its JSON form and the value of each where an older plan lacks it; `...` where every plan has it."""

    @property
    def in_plan(self) -> bool:
        """Whether a plan holds it; not where it follows from the settings alone."""
        return True

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Return its JSON-ready values; a key may be left out whose value is the one in `keys`."""

    @classmethod
    @abstractmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back, with the decisions of the techniques in front of this one.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """


D = TypeVar("D", bound=Decision)


def decision_of(kind: type[D], decisions: Iterable[Decision]) -> D:
    """Return the decision of a kind.

    Raises:
        LookupError: there is none.
    """
    for decision in decisions:
        if isinstance(decision, kind):
            return decision
    raise LookupError(f"no {kind.__name__} among the decisions")


@dataclass(frozen=True, kw_only=True)
class Budget(Settings, ABC):
    """What a technique may keep; `CompileConfig` is one as well, made of all techniques' budgets, asked in turn.

    Attributes:
        decision: class of the technique's decision.
    """

    decision: ClassVar[type[Decision]]

    @property
    def planned(self) -> bool:
        """Whether the decision is a plan's; not where the settings alone tell it."""
        return issubclass(self.decision, MeasuredDecision)

    def resolve(self, sizes: ModelSizes) -> Self:
        """Return the budget with counts for a model of these sizes in place of shares; counts stay as they are.

        Raises:
            ValueError: it does not fit the sizes; the message names the setting, its value and one that fits.
        """
        del sizes
        return self

    def left(self, sizes: ModelSizes) -> ModelSizes:
        """Return the sizes of the model behind this technique, as far as they are of use to the next ones."""
        return sizes

    def check(self, sizes: ModelSizes, left: ModelSizes) -> None:
        """Refuse a budget that does not go with what the techniques in front of it leave of the model.

        Raises:
            ValueError: the message names the setting, its value and one that fits.
        """

    def idle_settings(self) -> Mapping[str, str]:
        """Return the settings that decide nothing beside the others, and why: "no layer is left; give ... 3"."""
        return {}

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the settings, and their values, that leave open what stays, so that only measurements can tell."""
        del sizes
        return {}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return what calibration must measure for the decision."""
        del sizes
        return frozenset()

    @abstractmethod
    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the decision that follows, as a tuple of one.

        Args:
            sizes: sizes of the dense model.
            measured: what calibration measured; None where nothing was, for a decision with the right counts.
            earlier: decisions of the techniques in front of this one.
        """

    def complete(
        self, planned: Sequence[Decision], sizes: ModelSizes, earlier: Sequence[Decision] = ()
    ) -> tuple[Decision, ...]:
        """Return the decision where a plan is given, as a tuple of one: the plan's, or what follows from the settings.

        Args:
            planned: decisions of the plan.
            sizes: sizes of the dense model.
            earlier: decisions of the techniques in front of this one.

        Raises:
            ValueError: the budget does not fit the sizes.
        """
        if self.planned:
            return (decision_of(self.decision, planned),)
        return self.decide(sizes, None, earlier)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse a decision, one of a plan's, that was made for another budget or for other sizes.

        Args:
            decisions: all decisions of the plan.
            sizes: sizes of the dense model.
            measured: whether the plan was measured; a stand-in was not.

        Raises:
            CalibrationError: the message says what differs.
        """
