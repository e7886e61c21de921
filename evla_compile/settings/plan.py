"""The plan: what calibration decided for every technique that it measures for, and on what evidence; no torch."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from evla_compile.errors import CalibrationError
from evla_compile.json_text import to_json_text
from evla_compile.scratch import replacing
from evla_compile.settings.budgets.budget import Decision, MeasuredDecision, decision_of
from evla_compile.settings.budgets.layers import LayerDecision, LayerRule
from evla_compile.settings.budgets.mlp import MLPDecision
from evla_compile.settings.budgets.plan_values import MAX_NAMED, index, score
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan_tensors import PlanTensor, TensorFile, tensors_beside, write_tensors
from evla_compile.settings.sizes import ModelSizes

PLAN_FORMAT = 1
"""Version of a plan's JSON form. It rises where a key changes its meaning; a plan of an older format is read with the
defaults of the keys that it lacks, and an older version refuses keys that it does not know."""

DIGEST_DIGITS = 16
"""Hexadecimal digits of a fingerprint."""

_FIRST_KEYS = (
    "format", "layer_importance", "keep_layers", "mlp_neurons", "ranges", "frames", "frames_digest", "layer_rule",
    "checkpoint",
)  # fmt: skip # of format 1, in the order in which it has always been written


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a calibration decided, and what it rests on; with a configuration it fixes every rewrite."""

    decisions: tuple[MeasuredDecision, ...]
    """One for every technique that needs measurements, in the order of the pipeline. That of the layers is always
    given; the others keep everything where they are not."""
    ranges: tuple[tuple[str, float], ...] = ()
    """Activation ranges: the largest absolute input or output observed of each linear layer and attention, by module
    path; empty if not measured. They decide whether a layer fits float16."""
    frames: int = 0
    """Observations measured; 0 where the configuration left nothing to measure."""
    frames_digest: str | None = None
    """Digest of these observations as the policy saw them; None if nothing was measured."""
    checkpoint: tuple[tuple[str, str], ...] = ()
    """Fingerprint of the weights that were measured, by group (see `evla_compile.calibration.fingerprint`); empty if
    none were, so that the plan fits every policy of its sizes."""
    tensors: Mapping[str, PlanTensor] = field(default_factory=dict, repr=False, hash=False)
    """Weights that calibration has fitted, by module path; empty where nothing is repaired. They are kept in a
    safetensors file beside the JSON."""
    tensor_file: TensorFile | None = None
    """What that file is; None where there are no tensors. A plan that was read from JSON alone, as out of a manifest,
    knows it and lacks the tensors; see `with_tensors`."""

    def __post_init__(self) -> None:
        given = {type(decision): decision for decision in self.decisions}
        object.__setattr__(self, "decisions", tuple(given.get(kind) or kind() for kind in _kinds()))
        if self.tensors and self.tensor_file is None:
            object.__setattr__(self, "tensor_file", TensorFile.of(self.tensors))

    @property
    def keep_layers(self) -> tuple[int, ...]:
        """Decoder layers kept, ascending."""
        return decision_of(LayerDecision, self.decisions).keep

    @property
    def layer_importance(self) -> tuple[float, ...]:
        """I(l) of every layer of the unpruned decoder; empty if not measured."""
        return decision_of(LayerDecision, self.decisions).importance

    @property
    def layer_rule(self) -> LayerRule | None:
        """Rule that chose `keep_layers`; None where all stay, or where they were named."""
        return decision_of(LayerDecision, self.decisions).rule

    @property
    def mlp_neurons(self) -> tuple[tuple[int, ...], ...]:
        """MLP neurons kept in each of `keep_layers`, ascending; empty where all stay."""
        return tuple(kept for _, kept in decision_of(MLPDecision, self.decisions).neurons)

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values."""
        found: dict[str, Any] = {"format": PLAN_FORMAT}
        for decision in self.decisions:
            found |= decision.to_json()
        found |= {"ranges": dict(self.ranges), "frames": self.frames, "frames_digest": self.frames_digest}
        found["checkpoint"] = dict(self.checkpoint)
        if self.tensor_file is not None:
            found["tensors"] = asdict(self.tensor_file)
        return {name: found[name] for name in (*_FIRST_KEYS, *sorted(found.keys() - set(_FIRST_KEYS)))}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read `to_json`'s form back; keys with a default may be missing, as from an older format.

        Raises:
            CalibrationError: the data is not a plan, or one of a newer format.
        """
        values = _values(data)
        try:
            decisions: tuple[MeasuredDecision, ...] = ()
            for kind in _kinds():
                decisions += (kind.from_json(values, decisions),)
            return cls(
                decisions=decisions,
                ranges=_named_scores(values["ranges"]),
                frames=index(values["frames"]),
                frames_digest=None if values["frames_digest"] is None else _digest(values["frames_digest"]),
                checkpoint=_checkpoint(values["checkpoint"]),
                tensor_file=TensorFile.from_json(values["tensors"]),
            )
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"malformed plan: {error}") from error

    def with_tensors(self, file: Path) -> Self:
        """Return the plan with the tensors of its safetensors file; a plan that has none stays as it is.

        Raises:
            CalibrationError: the file is missing, another one, or malformed.
        """
        return self if self.tensor_file is None else replace(self, tensors=self.tensor_file.read(file))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, and its tensors, if it has any, as X.safetensors beside it.

        Each is written whole or not at all, the tensors first: a JSON file whose tensors are other ones is refused.

        Raises:
            CalibrationError: the plan was read from JSON alone, and lacks its tensors.
        """
        place = Path(path)
        self.check_tensors()
        if self.tensors:
            with replacing(tensors_beside(place)) as new:
                write_tensors(new, self.tensors)
        with replacing(place) as new:
            new.write_text(to_json_text(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file that `save` wrote, and map the tensors beside it.

        Raises:
            CalibrationError: a file cannot be read or is no plan.
        """
        place = Path(path)
        try:
            plan = cls.from_json(json.loads(place.read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise CalibrationError(f"plan {path}: {error}") from error
        return plan.with_tensors(tensors_beside(place))

    def check_tensors(self) -> None:
        """Refuse a plan that lacks the tensors that belong to it.

        Raises:
            CalibrationError: it does.
        """
        if self.tensor_file is not None and not self.tensors:
            raise CalibrationError(
                f"the plan belongs to {self.tensor_file.count} refit tensors, which it was read without: load it with"
                " Plan.load from its file, or calibrate again"
            )


def plan_without_calibration(sizes: ModelSizes, config: CompileConfig) -> Plan:
    """Return the plan of a configuration that leaves nothing to measure.

    Raises:
        CalibrationError: a budget needs measuring; nothing is ever calibrated on made-up data.
        ValueError: a budget does not fit the policy.
    """
    unmeasured = config.unmeasured(sizes)
    if unmeasured:
        settings = " and ".join(f"{name}={value}" for name, value in unmeasured.items())
        raise CalibrationError(
            f"what the policy can spare for {settings} has to be measured: give calibration= frames of the robot's"
            " task, or the plan= of an earlier calibration; without either, name the layers and the steps in tuples and"
            " leave the other budgets at everything (mlp_keep=1.0, repair='none'), or use CompileConfig.dense()"
        )
    return stand_in_plan(sizes, config)


def stand_in_plan(sizes: ModelSizes, config: CompileConfig) -> Plan:
    """Return a plan with the right counts and nothing measured, for counting only: the first layers and neurons stay.

    Which ones stay changes neither operations nor sizes nor times. The actions of a policy compiled with it mean
    nothing, so `compile` never uses it.

    Raises:
        ValueError: a budget does not fit the policy.
    """
    return Plan(decisions=planned(config.decide(sizes, None)))


def planned(decisions: tuple[Decision, ...]) -> tuple[MeasuredDecision, ...]:
    """Return the decisions that a plan holds."""
    return tuple(decision for decision in decisions if isinstance(decision, MeasuredDecision) and decision.in_plan)


def check_plan(plan: Plan, config: CompileConfig, sizes: ModelSizes) -> None:
    """Refuse a plan that was made for other budgets, by another rule, or for other sizes.

    Its weights are compared by `evla_compile.calibration.fingerprint.check_checkpoint`.

    Raises:
        CalibrationError: the message says what differs.
    """
    config.check_decision(plan.decisions, sizes, measured=plan.frames > 0)
    plan.check_tensors()


def _kinds() -> tuple[type[MeasuredDecision], ...]:
    """Return the kinds of decision that a plan holds, in the order of the pipeline."""
    kinds = (technique.decision for technique in CompileConfig.techniques())
    return tuple(kind for kind in kinds if issubclass(kind, MeasuredDecision))


def _values(data: object) -> dict[str, Any]:
    """Return the values of a plan's JSON object by key, with the defaults of those that it lacks."""
    defaults: dict[str, Any] = {}
    for kind in _kinds():
        defaults |= kind.keys
    kept = {
        each.name: each.default for each in fields(Plan) if each.default is not MISSING and each.name != "tensor_file"
    }
    defaults |= kept | {"frames": ..., "tensors": None}
    if not isinstance(data, dict):
        raise CalibrationError(f"a plan is a JSON object with the keys {sorted(['format', *defaults])}")
    version = data.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise CalibrationError(
            f"'format' is {version!r:.40}, expected a whole number from 1 to {PLAN_FORMAT}: it is no plan, or one from"
            " before plans had a format; calibrate again"
        )
    if version > PLAN_FORMAT:
        raise CalibrationError(
            f"the plan has format {version!r:.40}, and this version of evla_compile reads up to {PLAN_FORMAT}: update"
            " evla_compile, or calibrate again with this version"
        )
    unknown = sorted(map(repr, data.keys() - defaults - {"format"}))
    missing = [name for name, default in defaults.items() if default is ... and name not in data]
    if unknown or missing:
        raise CalibrationError(f"a plan of format {version} has no keys {unknown!s:.200} and needs {missing}")
    return {name: data.get(name, default) for name, default in defaults.items()}


def _digest(value: object) -> str:
    if not isinstance(value, str) or not re.fullmatch(f"[0-9a-f]{{{DIGEST_DIGITS}}}", value):
        raise ValueError(f"digest {value!r:.40}: expected {DIGEST_DIGITS} hexadecimal digits")
    return value


def _checkpoint(value: object) -> tuple[tuple[str, str], ...]:
    if value == ():
        return ()
    if not isinstance(value, dict) or not all(re.fullmatch("[a-z_]{1,40}", group) for group in value):
        raise ValueError(f"checkpoint {value!s:.60}: expected digests by group, such as llm_backbone")
    return tuple((group, _digest(digest)) for group, digest in value.items())


def _named_scores(value: object) -> tuple[tuple[str, float], ...]:
    if value == ():
        return ()
    if not isinstance(value, Mapping) or len(value) > MAX_NAMED:
        raise ValueError(f"ranges {value!s:.60}: expected an object of numbers")
    return tuple((str(name), score(largest)) for name, largest in value.items())
