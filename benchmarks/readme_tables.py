"""Writes the tables of README and docs from the files in benchmarks/results, with the conditions of every figure.

A table is between the marks `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written, and the
exit status is 1 where a page says something else than the results.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from benchmarks import result_tables as rows_of

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


TABLES: Mapping[str, Callable[[Path], list[str]]] = MappingProxyType(
    {
        "paper": rows_of.paper,
        "steps": rows_of.steps,
        "latency-base": rows_of.latency("latency-base-cuda-bfloat16", components=True),
        "latency-demo": rows_of.latency("latency-demo-cpu-float32"),
        "latency-mid": rows_of.latency("latency-mid-cpu-float32"),
        "full-size": rows_of.full_size,
        "calibration-cost": rows_of.calibration_cost,
        "compile-and-export": rows_of.compile_and_export,
        "closed-loop": rows_of.closed_loop("closed-loop"),
        "closed-loop-confirmation": rows_of.closed_loop("closed-loop-confirmation"),
        "closed-loop-repair": rows_of.closed_loop("closed-loop-repair"),
        "closed-loop-frontier": rows_of.closed_loop("closed-loop-frontier"),
        "closed-loop-screen": rows_of.screened,
        "closed-loop-repair-ablation": rows_of.closed_loop("closed-loop-repair-ablation"),
        "closed-loop-without-task": rows_of.without_task,
        "fidelity-ranks": rows_of.fidelity_ranks,
        "layer-redundancy": rows_of.layer_redundancy,
        "repair-language-model": rows_of.repair_language_model,
    }
)
"""The function that writes the lines of each table."""

PAGES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "README.md": ("closed-loop-frontier", "closed-loop-screen"),
        "docs/results/closed-loop.md": ("closed-loop-confirmation", "closed-loop"),
        "docs/results/full-size.md": ("full-size", "calibration-cost"),
        "docs/results/latency.md": ("latency-base", "latency-mid", "latency-demo", "compile-and-export"),
        "docs/results/layer-redundancy.md": ("layer-redundancy",),
        "docs/results/paper.md": ("paper", "steps"),
        "docs/results/quality.md": (
            "closed-loop-repair",
            "closed-loop-frontier",
            "closed-loop-screen",
            "closed-loop-repair-ablation",
            "closed-loop-without-task",
            "fidelity-ranks",
            "repair-language-model",
        ),
    }
)
"""Which tables each page has, by its path in the checkout."""


def fill(text: str, results: Path, expected: Sequence[str]) -> str:
    """Return `text` with every marked table rewritten.

    Raises:
        ValueError: a mark names no table, is not closed, or the marks are not those of the tables `expected`, in order.
    """
    found = []
    pieces = text.split("<!-- table: ")
    filled = [pieces[0]]
    for piece in pieces[1:]:
        name, opened, rest = piece.partition(" -->")
        _, closed, behind = rest.partition("<!-- end -->")
        if name not in TABLES or not opened or not closed:
            raise ValueError(f"mark of table {name!r:.40}: expected one of {', '.join(TABLES)}, closed by <!-- end -->")
        filled.append("\n".join([f"{name} -->", "", *TABLES[name](results), "", f"<!-- end -->{behind}"]))
        found.append(name)
    if found != list(expected):
        raise ValueError(f"marks of the tables {', '.join(found) or 'none'}: expected {', '.join(expected)}")
    return "<!-- table: ".join(filled)


def main() -> int:
    """Rewrite the tables of all pages, or check that they are up to date."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.readme_tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; status 1 where a page differs")
    arguments = parser.parse_args()
    stale = []
    for page, tables in PAGES.items():
        before = (ROOT / page).read_text(encoding="utf-8")
        after = fill(before, RESULTS, tables)
        if before != after:
            stale.append(page)
            if not arguments.check:
                (ROOT / page).write_text(after, encoding="utf-8")
    for page in stale:
        print(f"{page}: {'differs from the results' if arguments.check else 'tables written'}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
