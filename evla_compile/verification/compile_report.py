"""Read the fidelity that an artifact's compile report says; the report is untrusted."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evla_compile.arguments import number, whole_number
from evla_compile.artifact.fields import objects_at, value_at
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
        return None if report.get("fidelity") is None else _fidelity(value_at(report, "fidelity", dict))
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path} is no compile report ({error}): copy the artifact again, or compile again"
        ) from error


def _fidelity(data: Mapping[str, Any]) -> Fidelity:
    instructions = objects_at(data, "instructions")
    if not instructions:
        raise ValueError("'instructions' is empty: expected one at least")
    return Fidelity(
        drift=_figure(data, "drift"),
        beyond_noise=_share(data, "beyond_noise"),
        frames=_count(data, "frames"),
        draws=_count(data, "draws"),
        horizon=_count(data, "horizon"),
        end=_deviation(value_at(data, "end", dict)),
        step=_deviation(value_at(data, "step", dict)),
        rotation=_deviation(value_at(data, "rotation", dict)),
        gripper_flips=_share(data, "gripper_flips"),
        own_gripper_flips=_share(data, "own_gripper_flips"),
        dimensions=tuple(
            DimensionDeviation(
                name=value_at(each, "name", str),
                unit=value_at(each, "unit", str),
                mean=_figure(each, "mean"),
                p95=_figure(each, "p95"),
                own=_figure(each, "own"),
            )
            for each in objects_at(data, "dimensions")
        ),
        instructions=tuple(
            InstructionDeviation(
                instruction=value_at(each, "instruction", str),
                frames=_count(each, "frames"),
                drift=_figure(each, "drift"),
                own=_figure(each, "own"),
                beyond_noise=_share(each, "beyond_noise"),
            )
            for each in instructions
        ),
        episodes=tuple(
            EpisodeDeviation(
                episode=value_at(each, "episode", str),
                frames=_count(each, "frames"),
                beyond_noise=_share(each, "beyond_noise"),
                mean=_figure(each, "mean"),
            )
            for each in objects_at(data, "episodes")
        ),
    )


def _deviation(data: Mapping[str, Any]) -> Deviation:
    return Deviation(
        mean=_figure(data, "mean"),
        p95=_figure(data, "p95"),
        worst=_figure(data, "worst"),
        frame=_count(data, "frame", low=0),
        own=_figure(data, "own"),
    )


def _figure(data: Mapping[str, Any], name: str) -> float:
    return number(name, data.get(name), low=0.0, high=sys.float_info.max)


def _share(data: Mapping[str, Any], name: str) -> float:
    return number(name, data.get(name), low=0.0, high=1.0)


def _count(data: Mapping[str, Any], name: str, low: int = 1) -> int:
    return whole_number(name, data.get(name), low=low)
