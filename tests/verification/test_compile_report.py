"""A fidelity comes back from a compile report, and a report that is none is one error."""

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from evla_compile.errors import ArtifactError
from evla_compile.fidelity.measure import (
    Deviation,
    DimensionDeviation,
    EpisodeDeviation,
    Fidelity,
    InstructionDeviation,
)
from evla_compile.verification.compile_report import read_report

FIDELITY = Fidelity(
    drift=2.5,
    beyond_noise=0.05,
    frames=20,
    draws=2,
    horizon=8,
    end=Deviation(mean=1.5, p95=4.0, worst=9.0, frame=0, own=20.0),
    step=Deviation(mean=0.5, p95=1.0, worst=2.0, frame=3, own=3.0),
    rotation=Deviation(mean=0.0, p95=0.0, worst=0.0, frame=0, own=0.0),
    gripper_flips=0.01,
    own_gripper_flips=0.0,
    dimensions=(DimensionDeviation(name="x", unit="mm", mean=0.1, p95=0.2, own=1.0),),
    instructions=(InstructionDeviation(instruction="go", frames=3, drift=2.5, own=0.5, beyond_noise=0.1),),
    episodes=(EpisodeDeviation(episode="a", frames=3, beyond_noise=0.5, mean=2.0),),
)


def write(path: Path, report: Any) -> Path:
    path.write_text(json.dumps(report), encoding="utf-8")
    return path


def test_it_comes_back(tmp_path: Path) -> None:
    assert read_report(write(tmp_path / "report.json", {"passes": [], "fidelity": FIDELITY.to_json()})) == FIDELITY


@pytest.mark.parametrize("report", [{}, {"fidelity": None}])
def test_a_report_may_say_none(report: dict[str, Any], tmp_path: Path) -> None:
    assert read_report(write(tmp_path / "report.json", report)) is None


@pytest.mark.parametrize(
    ("way", "value"),
    [
        ((), []),
        (("beyond_noise",), 1.5),
        (("drift",), None),
        (("instructions",), []),
        (("instructions", 0, "own"), -1),
        (("beyond_noise",), True),
        (("gripper_flips",), -0.1),
        (("end",), None),
        (("end", "own"), float("nan")),
        (("end", "worst"), float("inf")),
        (("end", "mean"), "1"),
        (("end", "frame"), -1),
        (("frames",), 2.0),
        (("draws",), 0),
        (("dimensions",), {}),
        (("dimensions", 0), "x"),
        (("dimensions", 0, "name"), 1),
        (("episodes", 0, "frames"), None),
    ],
)
def test_a_report_with_another_value_is_one_error(way: tuple[Any, ...], value: Any, tmp_path: Path) -> None:
    report: dict[Any, Any] = {"fidelity": json.loads(json.dumps(deepcopy(FIDELITY.to_json())))}
    place: Any = report
    for key in ("fidelity", *way)[:-1]:
        place = place[key]
    place[("fidelity", *way)[-1]] = value
    with pytest.raises(ArtifactError, match="is no compile report"):
        read_report(write(tmp_path / "report.json", report))


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff", b"[" * 100_000])
def test_a_file_of_another_kind_is_one_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "report.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="is no compile report"):
        read_report(tmp_path / "report.json")


def test_a_missing_file_is_one_error(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="is no compile report"):
        read_report(tmp_path / "report.json")
