"""The frozen plan between calibration and rewrites: which decoder layers and MLP neurons stay; no torch."""

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from evla_compile.budgets import kept_layer_count, kept_neurons
from evla_compile.config import CompileConfig
from evla_compile.errors import CalibrationError
from evla_compile.scratch import replacing

if TYPE_CHECKING:
    from evla_compile.model.language import LanguageSizes
    from evla_compile.model.policy import ModelSizes

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
    """Largest absolute input or output observed in each linear layer and attention, by module path; empty
    if not measured. What float16 can hold is decided by it."""
    frames: int
    """Observations measured; 0 where the configuration left nothing to measure."""

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-ready values; the neurons of a layer as ranges, "0-3,5,7-20"."""
        neurons = [_to_ranges(neurons) for neurons in self.mlp_neurons]
        return asdict(self) | {"mlp_neurons": neurons, "ranges": dict(self.ranges)}

    @classmethod
    def from_json(cls, data: object) -> Self:
        """Read `to_json`'s form back.

        Raises:
            CalibrationError: the data is not a plan.
        """
        if not isinstance(data, dict) or set(data) != set(cls.__dataclass_fields__):
            raise CalibrationError(f"a plan is a JSON object with the keys {sorted(cls.__dataclass_fields__)}")
        try:
            keep_layers = _ascending([_index(value) for value in data["keep_layers"]])
            # counted before they are expanded: a plan may come from anywhere, and "0-999999" is soon repeated
            if len(data["mlp_neurons"]) not in (0, len(keep_layers)) or len(keep_layers) > _MAX_LAYERS:
                raise ValueError(f"neurons of {len(data['mlp_neurons'])} layers for {len(keep_layers)} kept layers")
            return cls(
                layer_importance=tuple(_score(value) for value in data["layer_importance"]),
                keep_layers=keep_layers,
                mlp_neurons=tuple(_from_ranges(neurons) for neurons in data["mlp_neurons"]),
                ranges=_named_scores(data["ranges"]),
                frames=_index(data["frames"]),
            )
        except (TypeError, ValueError) as error:
            raise CalibrationError(f"malformed plan: {error}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as a JSON file, whole or not at all."""
        with replacing(Path(path)) as new:
            new.write_text(json.dumps(self.to_json()) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a JSON file that `save` wrote.

        Raises:
            CalibrationError: the file cannot be read or holds no plan.
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


def _to_ranges(ascending: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for index in ascending:
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _from_ranges(text: object) -> tuple[int, ...]:
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,6}(-\d{1,6})?(,\d{1,6}(-\d{1,6})?)*", text, re.ASCII):
        raise ValueError(f'{text!r:.60}: expected ranges of neurons such as "0-3,5,7-20"')
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


def _score(value: object) -> float:
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"importance {value!r}: expected a finite number")
    return value


def _named_scores(value: object) -> tuple[tuple[str, float], ...]:
    if not isinstance(value, dict) or len(value) > _MAX_NEURONS:
        raise ValueError(f"ranges {value!s:.60}: expected an object of numbers")
    return tuple((str(name), _score(largest)) for name, largest in value.items())


def _index(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{value!r}: expected a whole number from 0 up")
    return value
