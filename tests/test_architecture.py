"""The layout of the package: which rooms may import which, what stays without torch, how long a file may be."""

from pathlib import Path

import pytest

from tests.import_rules import (
    COMPILER_LIBRARIES,
    FLOORS,
    Sources,
    against_the_floors,
    between_passes,
    circles,
    of_tests_or_benchmarks,
    with_a_compiler_library,
)

ROOT = Path(__file__).parents[1]
LONGEST = 350
"""Lines that a source file may have."""


@pytest.fixture(scope="module")
def sources() -> Sources:
    return Sources.of(ROOT)


def test_no_room_imports_a_floor_above_it_or_a_neighbour(sources: Sources) -> None:
    assert against_the_floors(sources) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("evla_compile.settings.config", "from evla_compile.host.processor import Processor"),
        ("evla_compile.graph.contract", "from evla_compile.runtime.policy import RuntimePolicy"),
        ("evla_compile.passes.prune_mlp", "from evla_compile import calibration"),
        (
            "evla_compile.compiler.result",
            "def export():\n    from evla_compile.exporters.artifact import export_artifact",
        ),
        ("evla_compile.artifact.files", "if TYPE_CHECKING:\n    from evla_compile.graph import sites"),
        ("evla_compile.attic.box", "import evla_compile.errors"),
    ],
)
def test_an_import_against_the_floors_is_found(sources: Sources, module: str, line: str) -> None:
    (fault,) = against_the_floors(sources.planted(module, line))
    assert fault.startswith(module)


def test_every_room_stands_on_a_floor(sources: Sources) -> None:
    rooms = {name.split(".")[1] for name in sources.texts if name.startswith("evla_compile.")} - {"__main__"}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_the_robots_rooms_never_need_a_library_of_the_compiler(sources: Sources) -> None:
    assert with_a_compiler_library(sources) == []


@pytest.mark.parametrize("library", COMPILER_LIBRARIES)
def test_a_library_of_the_compiler_is_found_however_long_the_way(sources: Sources, library: str) -> None:
    planted = sources.planted("evla_compile.settings.config", f"import {library}.utils")
    ways = with_a_compiler_library(planted)
    assert f"evla_compile.settings.config > {library}" in ways
    assert any(way.startswith("evla_compile.runtime.policy > ") for way in ways)


def test_a_lazy_import_of_a_library_is_no_fault(sources: Sources) -> None:
    assert with_a_compiler_library(sources.planted("evla_compile.doctor.facts", "def f():\n    import torch")) == []


def test_no_pass_imports_a_pass(sources: Sources) -> None:
    assert between_passes(sources) == []
    planted = sources.planted("evla_compile.passes.prune_mlp", "from evla_compile.passes import PruneLayers")
    assert len(between_passes(planted)) == 1


def test_nothing_imports_tests_or_benchmarks(sources: Sources) -> None:
    assert of_tests_or_benchmarks(sources) == []
    for module in ("evla_compile.demo.demo", "evla_compile.passes.prune_mlp"):
        assert len(of_tests_or_benchmarks(sources.planted(module, "import benchmarks.latency"))) == 1
    assert len(of_tests_or_benchmarks(sources.planted("benchmarks.paper", "from tests import conftest"))) == 1


def test_no_modules_import_each_other_in_a_circle(sources: Sources) -> None:
    assert circles(sources) == []
    planted = sources.planted("evla_compile.errors", "def f():\n    from evla_compile import terminal")
    planted = planted.planted("evla_compile.terminal", "import evla_compile.errors")
    assert circles(planted) == [["evla_compile.errors", "evla_compile.terminal"]]


def test_no_source_file_is_longer_than_can_be_read_at_once(sources: Sources) -> None:
    long = {module: text.count("\n") for module, text in sources.texts.items() if not module.startswith("tests.")}
    assert {module: lines for module, lines in long.items() if lines > LONGEST} == {}
