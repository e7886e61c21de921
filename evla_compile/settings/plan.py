"""The plan: which decoder layers and MLP neurons stay, as calibration decided for the rewrites; no torch."""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from evla_compile.errors import CalibrationError
from evla_compile.json_text import to_json_text
from evla_compile.scratch import replacing
from evla_compile.settings.budgets import kept_layer_count, kept_neurons
from evla_compile.settings.config import LAYER_RULES, CompileConfig, LayerRule

if TYPE_CHECKING:
    from evla_compile.settings.sizes import LanguageSizes, ModelSizes

PLAN_FORMAT = 1
"""Version of a plan's JSON form. It rises with every new field, which older versions must refuse; a plan of an older
format is read with the defaults of the fields that it lacks."""

DIGEST_DIGITS = 16
"""Hexadecimal digits of a fingerprint."""

_MAX_LAYERS, _MAX_NEURONS = 256, 100_000  # beyond any decoder; see `Plan.from_json`


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What a calibration decided; with a configuration it fixes every rewrite."""

    layer_importance: tuple[float, ...]
    """I(l) = 1 - mean cosine between input and output of every layer of the unpruned decoder; empty if not measured."""
    keep_layers: tuple[int, ...]
    """Decoder layers kept, ascending."""
    mlp_neurons: tuple[tuple[int, ...], ...]
    """MLP neurons kept in each of `keep_layers`, ascending; empty where all stay."""
    ranges: tuple[tuple[str, float], ...] = ()
    """Activation ranges: the largest absolute input or output observed of each linear layer and attention, by module
    path; empty if not measured. They decide whether a layer fits float16."""
    frames: int
    """Observations measured; 0 where the configuration left nothing to measure."""
    frames_digest: str | None = None
    """Digest of these observations as the policy saw them; None if nothing was measured."""
    layer_rule: LayerRule | None = None
    """Rule that chose `keep_layers`; None where all stay, or where they were named."""
    checkpoint: tuple[tuple[str, str], ...] = ()
    """Fingerprint of the weights that were measured, by group (see `evla_compile.calibration.fingerprint`); empty if
    none were, so that the plan fits every policy of its sizes."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; the neurons of a layer as runs of indices, "0-3,5,7-20"."""
        neurons = [_to_runs(neurons) for neurons in self.mlp_neurons]
        named = {"mlp_neurons": neurons, "ranges": dict(self.ranges), "checkpoint": dict(self.checkpoint)}
        return {"format": PLAN_FORMAT} | asdict(self) | named

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read `to_json`'s form back; fields with a default may be missing, as from an older format.

        Raises:
            CalibrationError: the data is not a plan, or one of a newer format.
        """
        values = _fields(data, cls)
        try:
            keep_layers = _ascending([_index(value) for value in values["keep_layers"]])
            # counted before they are expanded: a plan may come from anywhere, and "0-999999" is soon repeated
            if len(values["mlp_neurons"]) not in (0, len(keep_layers)) or len(keep_layers) > _MAX_LAYERS:
                raise ValueError(f"neurons of {len(values['mlp_neurons'])} layers for {len(keep_layers)} kept layers")
            return cls(
                layer_importance=tuple(_score(value) for value in values["layer_importance"]),
                keep_layers=keep_layers,
                mlp_neurons=tuple(_from_runs(neurons) for neurons in values["mlp_neurons"]),
                ranges=_named_scores(values["ranges"]),
                frames=_index(values["frames"]),
                frames_digest=None if values["frames_digest"] is None else _digest(values["frames_digest"]),
                layer_rule=_layer_rule(values["layer_rule"]),
                checkpoint=_checkpoint(values["checkpoint"]),
            )
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"malformed plan: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        with replacing(Path(path)) as new:
            new.write_text(to_json_text(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file that `save` wrote.

        Raises:
            CalibrationError: the file cannot be read or is no plan.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError) as error:
            raise CalibrationError(f"plan {path}: {error}") from error


def plan_without_calibration(sizes: "LanguageSizes", config: CompileConfig) -> Plan:
    """Return the plan of a configuration that leaves nothing to measure.

    Raises:
        CalibrationError: a budget needs measuring; nothing is ever calibrated on made-up data.
        ValueError: a budget does not fit the policy.
    """
    if needs_calibration(sizes, config):
        raise CalibrationError(
            f"keep_layers={config.keep_layers} and mlp_keep={config.mlp_keep} need to know which layers and neurons the"
            " policy can spare: give calibration= frames of the robot's task, or the plan= of an earlier calibration;"
            " without either, name the layers in a tuple and keep mlp_keep=1.0, or use CompileConfig.dense()"
        )
    keep = config.keep_layers if isinstance(config.keep_layers, tuple) else tuple(range(sizes.layers))
    return Plan(layer_importance=(), keep_layers=keep, mlp_neurons=(), frames=0)


def stand_in_plan(sizes: "ModelSizes", config: CompileConfig) -> Plan:
    """Return a plan with the right counts and nothing measured, for counting only: the first layers and neurons stay.

    Which ones stay changes neither operations nor sizes nor times. The actions of a policy compiled with it mean
    nothing, so `compile` never uses it.

    Raises:
        ValueError: a budget does not fit the policy.
    """
    language = sizes.language
    named, neurons = config.keep_layers, kept_neurons(config, language.mlp_width)
    keep = named if isinstance(named, tuple) else tuple(range(kept_layer_count(config, language)))
    mlp_neurons = (tuple(range(neurons)),) * len(keep) if neurons < language.mlp_width else ()
    return Plan(layer_importance=(), keep_layers=keep, mlp_neurons=mlp_neurons, frames=0)


def needs_calibration(sizes: "LanguageSizes", config: CompileConfig) -> bool:
    """Tell whether a budget leaves open which layers or neurons stay, so that only measurements can place it.

    Raises:
        ValueError: a budget does not fit the decoder.
    """
    kept = kept_layer_count(config, sizes)  # refuses layers that the decoder lacks, named ones too
    counted = not isinstance(config.keep_layers, tuple) and kept < sizes.layers
    return counted or kept_neurons(config, sizes.mlp_width) < sizes.mlp_width


def most_important(importance: Sequence[float], count: int) -> tuple[int, ...]:
    """Return the `count` layers that stay, ascending: the least important go, the lower index first among equals."""
    ranked = sorted(range(len(importance)), key=lambda layer: (importance[layer], layer))
    return tuple(sorted(ranked[len(importance) - count :]))


def _to_runs(ascending: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in ascending:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _from_runs(text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text, re.ASCII):
        raise ValueError(f'{text!r:.60}: expected runs of neurons such as "0-3,5,7-20"')
    found: list[int] = []
    for run in text.split(","):
        first, _, last = run.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
        if len(found) > _MAX_NEURONS:
            raise ValueError(f"{len(found)} neurons in a layer: expected at most {_MAX_NEURONS}")
    return _ascending(found)


def _ascending(indices: list[int]) -> tuple[int, ...]:
    if not indices or any(first >= second for first, second in pairwise(indices)):
        raise ValueError(f"indices {indices!s:.60}: expected at least one, in ascending order")
    return tuple(indices)


def _fields(data: object, plan: type[Plan]) -> dict[str, Any]:
    """Return the fields of a plan's JSON object by name, with the defaults of those that an older format lacks."""
    fields = plan.__dataclass_fields__
    if not isinstance(data, dict):
        raise CalibrationError(f"a plan is a JSON object with the keys {sorted(['format', *fields])}")
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
    unknown = sorted(map(repr, data.keys() - fields - {"format"}))
    missing = [name for name, field in fields.items() if field.default is MISSING and name not in data]
    if unknown or missing:
        raise CalibrationError(f"a plan of format {version} has no keys {unknown!s:.200} and needs {missing}")
    return {name: data.get(name, field.default) for name, field in fields.items()}


def _score(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"importance {value!r:.40}: expected a finite number")
    return float(value)  # JSON writers print 1.0 as 1


def _layer_rule(value: object) -> LayerRule | None:
    rule: LayerRule | None = next((rule for rule in LAYER_RULES if rule == value), None)
    if rule is None and value is not None:
        raise ValueError(f"layer_rule {value!r:.40}: expected one of {', '.join(LAYER_RULES)}, or null")
    return rule


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
    if not isinstance(value, dict) or len(value) > _MAX_NEURONS:
        raise ValueError(f"ranges {value!s:.60}: expected an object of numbers")
    return tuple((str(name), _score(largest)) for name, largest in value.items())


def _index(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r}: expected a whole number from 0 up")
    return value
