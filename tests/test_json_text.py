"""JSON holds finite numbers alone, wherever the package writes it."""

import ast
import json
from pathlib import Path
from typing import Any

import pytest

import evla_compile
from evla_compile import json_text
from evla_compile.cli.console import print_json
from evla_compile.json_text import to_json_text
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.plan import Plan

PACKAGE = Path(evla_compile.__file__).parent
SOURCES = sorted({path.resolve() for folder in (PACKAGE, *PACKAGE.iterdir()) for path in folder.glob("**/*.py")})


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "the value is nan"),
        ({"a": [1.0, {"b": float("inf")}]}, r"a\[1\]\.b is inf"),
        ({"actions": ((0.0, float("-inf")),)}, r"actions\[0\]\[1\] is -inf"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_with_its_place(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"{message}, which JSON cannot hold"):
        to_json_text(value)
    with pytest.raises(ValueError, match="which JSON cannot hold"):
        print_json(value)


def test_other_faults_of_a_value_stay_pythons_own() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json_text({float("nan"): 1.0})
    with pytest.raises(TypeError, match="not JSON serializable"):
        to_json_text({1.0})


def test_what_is_finite_is_written_as_python_writes_it() -> None:
    value = {"a": [1, 2.5, None, True], "b": {"c": "\u00e4"}}
    assert to_json_text(value) == json.dumps(value)
    assert to_json_text({"b": 1, "a": 2}, sort_keys=True) == '{"a": 2, "b": 1}'
    assert to_json_text(value, indent=1) == json.dumps(value, indent=1)


def test_a_plan_that_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    plan = Plan(decisions=(LayerDecision(keep=(0,), importance=(0.5, float("nan"))),), frames=1)
    with pytest.raises(ValueError, match=r"layer_importance\[1\] is nan"):
        plan.save(tmp_path / "plan.json")
    assert not list(tmp_path.iterdir())


def test_nothing_else_in_the_package_writes_json() -> None:
    assert len(SOURCES) > 60
    found = []
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text(encoding="utf-8"))):
            name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
            if name in ("dump", "dumps", "JSONEncoder"):
                found.append(source)
    assert set(found) == {Path(json_text.__file__).resolve()}
