"""The score as a table, from the lines that a run wrote."""

import json
from collections.abc import Iterator, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

Result = Mapping[str, Any]
"""One trial: group, file, number, change, outcome, the test that failed, seconds."""


def read_results(path: Path) -> list[Result]:
    """Read the lines of a run."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(results: Sequence[Result], sizes: Mapping[str, int]) -> Iterator[str]:
    """Yield a row per group and one of all: sampled mutants, what came of them, the share that tests noticed."""
    yield "| modules | mutants | sampled | failed a test | ran too long | survived | score | 95 % interval |"
    yield "|---|---:|---:|---:|---:|---:|---:|---|"
    for group, size in sizes.items():
        yield _row(group, size, [result for result in results if result["group"] == group])
    yield _row("all", sum(sizes.values()), results)


def _row(name: str, size: int, results: Sequence[Result]) -> str:
    count = {outcome: sum(each["outcome"] == outcome for each in results) for outcome in _OUTCOMES}
    noticed = count["killed"] + count["timeout"]
    low, high = _interval(noticed, len(results))
    score = f"{noticed / len(results):.0%}" if results else "-"
    cells = (name, size, len(results), *count.values(), score, f"{low:.0%} to {high:.0%}")
    return f"| {' | '.join(map(str, cells))} |"


_OUTCOMES = ("killed", "timeout", "survived")


def _interval(hits: int, count: int) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a share."""
    if not count:
        return 0.0, 1.0
    z, share = 1.96, hits / count
    middle, width = share + z * z / (2 * count), z * sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return (middle - width) / (1 + z * z / count), (middle + width) / (1 + z * z / count)


def survivors(results: Sequence[Result]) -> Iterator[str]:
    """Yield every mutant that no test noticed, as a diff."""
    for result in results:
        if result["outcome"] == "survived":
            yield f"{result['file']} #{result['number']}, {result['change']}"
