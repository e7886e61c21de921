"""The mutation score's own parts; its operators need mutmut, which the tests do without."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.mutation.report import survivors, table
from benchmarks.mutation.suites import SUITES, Suite
from benchmarks.mutation.trial import changed

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("suite", SUITES, ids=lambda suite: suite.file)
def test_every_suite_names_files_that_are_there(suite: Suite) -> None:
    assert all((ROOT / file).is_file() for file in (suite.file, *suite.tests))
    assert not (ROOT / suite.file).is_symlink()


@pytest.mark.parametrize(
    "folder",
    ["passes", *(f"evla_compile/{room}" for room in ("calibration", "certificate", "fidelity", "verification"))],
)
def test_every_module_of_a_mutated_room_has_a_suite(folder: str) -> None:
    modules = {f"{folder}/{file.name}" for file in (ROOT / folder).glob("*.py") if file.name != "__init__.py"}
    assert modules - {suite.file for suite in SUITES} == set()


def test_a_score_counts_what_failed_or_ran_too_long_and_says_how_sure_it_is() -> None:
    outcomes = (
        [("passes", "killed")] * 7 + [("passes", "timeout")] * 2 + [("passes", "survived"), ("runtime", "killed")]
    )
    results = [
        {"group": group, "outcome": outcome, "file": "x.py", "number": 3, "change": "line 1\n- a\n+ b"}
        for group, outcome in outcomes
    ]
    header, line, passes, runtime, total = table(results, {"passes": 50, "runtime": 9})
    assert header.count("|") == line.count("|") == passes.count("|")
    assert passes == "| passes | 50 | 10 | 7 | 2 | 1 | 90% | 60% to 98% |"
    assert runtime == "| runtime | 9 | 1 | 1 | 0 | 0 | 100% | 21% to 100% |"
    assert total == "| all | 59 | 11 | 8 | 2 | 1 | 91% | 62% to 98% |"
    assert list(survivors(results)) == ["x.py #3, line 1\n- a\n+ b"]


def test_a_file_is_changed_for_a_while_alone(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("a = 1\n", encoding="utf-8")
    before = path.stat().st_mtime_ns
    with changed(path, "a = 2\n"):
        assert path.read_text(encoding="utf-8") == "a = 2\n"
    assert path.read_text(encoding="utf-8") == "a = 1\n"
    assert path.stat().st_mtime_ns == before


SCRIPT = """
import os
import subprocess
import sys
from pathlib import Path
from benchmarks.mutation.trial import run_tests
for test, limit in (("test_right.py", 60), ("test_wrong.py", 60), ("test_endless.py", 0.3)):
    print(run_tests(Path(sys.argv[1]), [test], limit).outcome)
try:
    run_tests(Path(sys.argv[1]), ["test_nothing.py"], 60)
except ValueError as error:
    print(str(error).splitlines()[0])
"""


@pytest.mark.skipif(sys.platform != "linux", reason="trials are forked")
def test_a_trial_tells_a_failure_from_a_pass_and_from_an_endless_loop(tmp_path: Path) -> None:
    """In a process of its own, as a process with threads is not to be forked."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    for name, body in (("right", "assert True"), ("wrong", "assert False"), ("endless", "while True: pass")):
        (checkout / f"test_{name}.py").write_text(f"def test_it():\n    {body}\n", encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, checkout], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["survived", "killed", "timeout", "pytest ran nothing of test_nothing.py:"]
