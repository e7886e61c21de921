"""Draw mutants, run their tests, and print the score: `python -m benchmarks.mutation`; results go to build/mutation."""

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from benchmarks.mutation.mutants import Mutant, sample
from benchmarks.mutation.report import read_results, survivors, table
from benchmarks.mutation.suites import SUITES, Suite
from benchmarks.mutation.trial import Trial, changed, copy_checkout, preload, run_tests

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "mutation"


def main() -> None:
    """Run the trials up to the last mutant of the sample or the end of the time."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation", description=__doc__)
    parser.add_argument("--count", type=int, default=40, help="mutants drawn of each group of modules")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--minutes", type=float, default=60.0, help="no trial begins after that")
    parser.add_argument("--group", action="append", help="only these groups of modules")
    arguments = parser.parse_args()
    end = time.monotonic() + 60 * arguments.minutes
    suites = [suite for suite in SUITES if not arguments.group or suite.group in arguments.group]
    mutants, sizes = sample(ROOT, suites, arguments.count, arguments.seed)
    copy, results = FOLDER / "checkout", FOLDER / "results.jsonl"
    copy_checkout(ROOT, copy)
    results.unlink(missing_ok=True)
    results.touch()
    preload()
    suite_of = {suite.file: suite for suite in suites}
    limits = _time_limits(copy, [suite_of[file] for file in dict.fromkeys(mutant.file for mutant in mutants)])
    for mutant in mutants:
        if time.monotonic() > end:
            break
        tests = suite_of[mutant.file].tests
        with changed(copy / mutant.file, mutant.source):
            trial = run_tests(copy, tests, limits[tests])
        _note(results, mutant, trial)
    shutil.rmtree(copy)
    found = read_results(results)
    print("\n".join((*table(found, sizes), "", *survivors(found))))


def _time_limits(copy: Path, suites: list[Suite]) -> dict[tuple[str, ...], float]:
    """Run the tests on the unchanged files, where they have to pass, and return how many seconds they may take."""
    limits: dict[tuple[str, ...], float] = {}
    for tests in dict.fromkeys(suite.tests for suite in suites):
        trial = run_tests(copy, tests, limit=600)
        if trial.outcome != "survived":
            raise SystemExit(f"{', '.join(tests)} without any change: {trial.outcome}\n{trial.log[-4000:]}")
        limits[tests] = 30 + 4 * trial.seconds
        print(f"{', '.join(tests)}: {trial.seconds:.1f} s without any change", flush=True)
    return limits


def _note(results: Path, mutant: Mutant, trial: Trial) -> None:
    line = asdict(mutant) | {"outcome": trial.outcome, "reason": trial.reason, "seconds": round(trial.seconds, 2)}
    del line["source"]
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(f"{trial.outcome:8} {trial.seconds:5.1f} s  {mutant.file} {mutant.change.splitlines()[:2]}", flush=True)


if __name__ == "__main__":
    main()
