"""Read a fidelity back from JSON, as compile reports hold it; the JSON is untrusted; no torch."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evla_compile.errors import ArtifactError
from evla_compile.fidelity.measure import (
    Deviation,
    DimensionDeviation,
    EpisodeDeviation,
    Fidelity,
    InstructionDeviation,
)


def read_report(path: Path) -> Fidelity | None:
    """Return the fidelity that a compile report says; None where it says none, as where no frames were given.

    Raises:
        ArtifactError: the file cannot be read, or is no such report.
    """
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(report, dict):
            raise ValueError(f"found {report!r:.60}: expected an object")
        found = report.get("fidelity")
        return None if found is None else _fidelity(found)
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is no compile report ({error}): copy the artifact again, or compile again"
        ) from error


def _fidelity(data: Any) -> Fidelity:
    values = _object(data, "fidelity")
    return Fidelity(
        drift=_number(values, "drift"),
        beyond_noise=_number(values, "beyond_noise", high=1.0),
        frames=_count(values, "frames"),
        draws=_count(values, "draws"),
        horizon=_count(values, "horizon"),
        end=_deviation(values, "end"),
        step=_deviation(values, "step"),
        rotation=_deviation(values, "rotation"),
        gripper_flips=_number(values, "gripper_flips", high=1.0),
        own_gripper_flips=_number(values, "own_gripper_flips", high=1.0),
        dimensions=tuple(
            DimensionDeviation(
                name=_text(each, "name"),
                unit=_text(each, "unit"),
                mean=_number(each, "mean"),
                p95=_number(each, "p95"),
                own=_number(each, "own"),
            )
            for each in _objects(values, "dimensions")
        ),
        instructions=_instructions(values),
        episodes=tuple(
            EpisodeDeviation(
                episode=_text(each, "episode"),
                frames=_count(each, "frames"),
                beyond_noise=_number(each, "beyond_noise", high=1.0),
                mean=_number(each, "mean"),
            )
            for each in _objects(values, "episodes")
        ),
    )


def _instructions(data: Mapping[str, Any]) -> tuple[InstructionDeviation, ...]:
    found = tuple(
        InstructionDeviation(
            instruction=_text(each, "instruction"),
            frames=_count(each, "frames"),
            drift=_number(each, "drift"),
            own=_number(each, "own"),
            beyond_noise=_number(each, "beyond_noise", high=1.0),
        )
        for each in _objects(data, "instructions")
    )
    if not found:
        raise ValueError("'instructions' is empty: expected one at least")
    return found


def _deviation(data: Mapping[str, Any], name: str) -> Deviation:
    values = _object(data.get(name), name)
    return Deviation(
        mean=_number(values, "mean"),
        p95=_number(values, "p95"),
        worst=_number(values, "worst"),
        frame=_count(values, "frame", low=0),
        own=_number(values, "own"),
    )


def _object(data: Any, place: str) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{place!r} is {data!r:.60}: expected an object")
    return data


def _objects(data: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    found = data.get(name)
    if not isinstance(found, list):
        raise ValueError(f"{name!r} is {found!r:.60}: expected a list")
    return [_object(each, name) for each in found]


def _number(data: Mapping[str, Any], name: str, high: float = sys.float_info.max) -> float:
    found = data.get(name)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 <= found <= high:
        raise ValueError(f"{name!r} is {found!r:.60}: expected a finite number from 0{f' to {high:g}' * (high == 1)}")
    return float(found)


def _count(data: Mapping[str, Any], name: str, low: int = 1) -> int:
    found = data.get(name)
    if isinstance(found, bool) or not isinstance(found, int) or found < low:
        raise ValueError(f"{name!r} is {found!r:.60}: expected a whole number from {low} up")
    return found


def _text(data: Mapping[str, Any], name: str) -> str:
    found = data.get(name)
    if not isinstance(found, str):
        raise ValueError(f"{name!r} is {found!r:.60}: expected a text")
    return found
