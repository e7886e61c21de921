"""Which kept layers are refit to the dense policy in closed form, and how strongly; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Literal, Self, TypeAlias, get_args

from evla_compile.arguments import is_listed, number
from evla_compile.errors import CalibrationError
from evla_compile.settings.budgets.budget import Budget, Decision, Measured, MeasuredDecision, Measurement, decision_of
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.mlp import MLPDecision
from evla_compile.settings.budgets.plan_values import ascending, index, score
from evla_compile.settings.budgets.tokens import TokenDecision
from evla_compile.settings.budgets.vision import VisionDecision
from evla_compile.settings.setting import one_of, setting, whole_from
from evla_compile.settings.sizes import ModelSizes

RepairScope: TypeAlias = Literal["none", "last", "gaps", "all"]
"""Which kept decoder layers are refit: none, the last one, those in front of a deleted layer, or all."""

REPAIR_SCOPES: tuple[RepairScope, ...] = get_args(RepairScope)
"""All values of `RepairScope`, the narrowest first."""

REPAIR_RHOS = (0.01, 0.1, 1.0)
"""Strengths of the penalty that calibration tries where none is given."""

_MAX_WARNINGS, _MAX_TRIALS = 1000, 100


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairTrial:
    """What one repair, or none, came to on the held-out frames."""

    scope: RepairScope
    """Which layers were refit."""
    rho: float
    """Strength of the penalty; 0.0 for none."""
    deviation: float
    """Mean distance of the held-out frames' actions from the dense policy's, at equal noise; see `action_deviation`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RepairDecision(MeasuredDecision):
    """The repair with the least deviation on the held-out frames; none, if that is the least."""

    keys: ClassVar[Mapping[str, Any]] = {"repair": None}

    scope: RepairScope = "none"
    """Which layers are refit."""
    rho: float = 0.0
    """Strength of the penalty; 0.0 for none."""
    layers: tuple[int, ...] = ()
    """Indices of the layers that are refit, ascending; their weights are in the plan's tensors."""
    trials: tuple[RepairTrial, ...] = ()
    """All repairs that were tried, that without refitting first; empty where none was asked for."""
    fitted: int = 0
    """Frames that were fitted on."""
    held_out: int = 0
    """Frames that decided."""
    warnings: tuple[str, ...] = ()
    """What is to be said about the frames."""

    def idle(self, sizes: ModelSizes) -> bool:
        """Tell whether no layer is refit."""
        del sizes
        return not self.layers

    @property
    def chosen(self) -> RepairTrial:
        """The trial that was taken; there is none where none was asked for.

        Raises:
            LookupError: there were no trials.
        """
        for trial in self.trials:
            if (trial.scope, trial.rho) == (self.scope, self.rho):
                return trial
        raise LookupError("no repair was tried")

    def to_json(self) -> dict[str, Any]:
        """Return all of it under one key; nothing where none was tried, so that such plans are written as before."""
        return {"repair": asdict(self)} if self.trials else {}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], earlier: Sequence[Decision]) -> Self:
        """Read `to_json`'s form back.

        Raises:
            TypeError: a value is of another type.
            ValueError: a value is malformed.
        """
        del earlier
        found = data["repair"]
        if found is None:
            return cls()
        if not isinstance(found, Mapping) or found.keys() != set(cls.__slots__):
            raise ValueError(f"repair {found!s:.60}: expected an object with the keys {sorted(cls.__slots__)}")
        trials, warnings, layers = (list(found[name]) for name in ("trials", "warnings", "layers"))
        if not 0 < len(trials) <= _MAX_TRIALS or len(warnings) > _MAX_WARNINGS:
            raise ValueError(f"{len(trials)} trials and {len(warnings)} warnings of a repair: expected some, and fewer")
        decision = cls(
            scope=_scope(found["scope"]),
            rho=score(found["rho"]),
            layers=ascending([index(value) for value in layers]) if layers else (),
            trials=tuple(
                RepairTrial(scope=_scope(t["scope"]), rho=score(t["rho"]), deviation=score(t["deviation"]))
                for t in trials
            ),
            fitted=index(found["fitted"]),
            held_out=index(found["held_out"]),
            warnings=tuple(str(text)[:500] for text in warnings),
        )
        if not any((each.scope, each.rho) == (decision.scope, decision.rho) for each in decision.trials):
            raise ValueError(f"repair {decision.scope!r} with rho={decision.rho} is none of its trials")
        if (decision.scope == "none") != (not decision.layers):
            raise ValueError(f"repair {decision.scope!r} of the layers {decision.layers}")
        return decision


def _read_weights(name: str, weights: Any) -> tuple[float, float, float]:
    if not is_listed(weights) or len(weights) != 3:
        raise ValueError(f"{name}={weights!r}: expected three numbers from 0 up, as in (0.1, 1, 20)")
    visual, text, cognition = (number(name, value, low=0.0, high=1e6) for value in weights)
    if not cognition:
        raise ValueError(f"{name}={weights!r}: the last one, of the cognition token, must be above 0")
    return visual, text, cognition


def _read_rho(name: str, rho: Any) -> float | None:
    return None if rho is None else number(name, rho, low=0.0, high=1e6, low_open=True)


@dataclass(frozen=True, kw_only=True)
class RepairBudget(Budget):
    """Kept layers whose projections may be refit, and on how many frames."""

    decision: ClassVar[type[Decision]] = RepairDecision

    repair: RepairScope = setting(
        "all",
        text="Kept layers that are refit to the dense policy, at most.",
        read=one_of(REPAIR_SCOPES),
        off="none",
    )
    """Kept decoder layers whose output and down projections calibration refits to the dense policy in closed form, at
    most: "all", those in front of a deleted layer ("gaps"), the "last" one, or "none". Narrower scopes are tried too,
    and what helps most on held-out frames is taken, none of them if none helps."""
    repair_rho: float | None = setting(
        None,
        text="Strength of the repair's penalty; chosen on held-out frames if not given.",
        read=_read_rho,
        parse=float,
        metavar="RHO",
        forms="a number above 0 as in 0.01",
    )
    """Strength of the ridge penalty on the change of a weight, in units of the features' mean square: large values
    leave weights as they are. None for the best of `REPAIR_RHOS` on held-out frames."""
    repair_weights: tuple[float, float, float] = setting(
        (0.1, 1.0, 20.0),
        text="Weights of visual tokens, text and the cognition token in the fit.",
        read=_read_weights,
        parse=lambda text: tuple(float(part) for part in text.split(",")),
        metavar="V,T,C",
        forms="three numbers from 0 up as in 0.1,1,20",
    )
    """Weights of a visual token, a text token and the cognition token in the regressions."""
    repair_frames: int = setting(
        40,
        text="Calibration frames that a repair needs for each instruction.",
        read=whole_from(2, 100_000),
    )
    """Calibration frames that a repair needs for each instruction, on average over the instructions; fewer are refused,
    since a fit on few frames can do harm."""

    @property
    def repair_scopes(self) -> tuple[RepairScope, ...]:
        """Scopes that may be refit, the narrowest first; none where nothing is repaired."""
        return REPAIR_SCOPES[1 : REPAIR_SCOPES.index(self.repair) + 1]

    @property
    def repair_strengths(self) -> tuple[float, ...]:
        """Strengths of the penalty that are tried."""
        return REPAIR_RHOS if self.repair_rho is None else (self.repair_rho,)

    def idle_settings(self) -> Mapping[str, str]:
        """Return what decides nothing where nothing is repaired."""
        if self.repair != "none":
            return {}
        names = ("repair_rho", "repair_weights", "repair_frames")
        return dict.fromkeys(names, "nothing is repaired; give --repair all")

    def unmeasured(self, sizes: ModelSizes) -> Mapping[str, Any]:
        """Return the scope; `CompileConfig` leaves it out where there is nothing to repair."""
        del sizes
        return {} if self.repair == "none" else {"repair": self.repair}

    def measurements(self, sizes: ModelSizes) -> frozenset[Measurement]:
        """Return the repair itself, where it is asked for; see `unmeasured`."""
        del sizes
        return frozenset() if self.repair == "none" else frozenset({"repair"})

    def decide(self, sizes: ModelSizes, measured: Measured | None, earlier: Sequence[Decision]) -> tuple[Decision, ...]:
        """Return the repair that calibration found best; none where nothing was measured, or nothing was compressed."""
        if self.repair == "none" or measured is None or measured.repair is None:
            return (RepairDecision(),)
        return (measured.repair(earlier) if compressed(earlier, sizes) else RepairDecision(),)

    def check_decision(self, decisions: Sequence[Decision], sizes: ModelSizes, *, measured: bool) -> None:
        """Refuse a repair that the settings do not allow, or of layers that go; see `Budget.check_decision`."""
        found, keep = decision_of(RepairDecision, decisions), decision_of(LayerDecision, decisions).keep
        if found.layers and not (found.scope in self.repair_scopes and self.repair_rho in (None, found.rho)):
            raise CalibrationError(
                f"the plan repairs {found.scope!r} with rho={found.rho}, the settings ask for {self.repair!r} with"
                f" rho={self.repair_rho or 'any'}: calibrate again with these settings, or give repair={found.scope!r}"
            )
        if not set(found.layers) <= set(keep):
            raise CalibrationError(f"the plan repairs layers {found.layers}, of which it keeps {keep} only")
        if measured and self.repair != "none" and compressed(decisions, sizes) and not found.trials:
            raise CalibrationError(
                f"the plan was measured without a repair, the settings ask for repair={self.repair!r}: calibrate again"
                " with these settings, or give repair='none'"
            )


def compressed(decisions: Sequence[Decision], sizes: ModelSizes) -> bool:
    """Tell whether the techniques in front of a repair take anything away that it could make up for."""
    kinds = (LayerDecision, MLPDecision, VisionDecision, TokenDecision)
    return any(isinstance(decision, kinds) and not decision.idle(sizes) for decision in decisions)


def _scope(value: object) -> RepairScope:
    scope: RepairScope | None = next((scope for scope in REPAIR_SCOPES if scope == value), None)
    if scope is None:
        raise ValueError(f"repair scope {value!r:.40}: expected one of {', '.join(REPAIR_SCOPES)}")
    return scope
