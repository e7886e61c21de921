"""Writes the tables of README and docs from the files in benchmarks/results, with the conditions of every figure.

A table is between the marks `<!-- table: NAME -->` and `<!-- end -->`. With --check nothing is written, and the
exit status is 1 where a page says something else than the results.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from types import MappingProxyType
from typing import Any

from benchmarks.latency.components import COMPONENTS
from evla_compile.units import bytes_text

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def paper(results: Path) -> list[str]:
    """Return EfficientVLA's Table 2 beside our counts."""
    data = _read(results / "paper-tables.json")
    rows: dict[str, dict[str, Any]] = {}
    for figure in data["tables"]:
        if figure["table"] == 2:
            rows.setdefault(figure["row"], {})[figure["quantity"][1]] = figure
    cells = [
        [
            name,
            f"{figures['%']['published']} %",
            f"{figures['%']['ours']:.2f} %",
            "-" if figures["%"]["strict"] is None else f"{figures['%']['strict']:.2f} %",
            f"{figures['B']['published']} B",
            f"{figures['B']['ours']:.3f} B",
            f"26 text tokens, `paper` convention, {data['conditions']}",
        ]
        for name, figures in rows.items()
    ]
    header = ("row", "FLOPs published", "ours, T + 4", "ours, strict T", "parameters published", "ours", "conditions")
    return _table(header, cells, left=1)


def steps(results: Path) -> list[str]:
    """Return the FLOPs after each rewrite, as a share of upstream's."""
    data = _read(results / "paper-tables.json")
    first, cells = data["steps"][0], []
    for before, step in zip([first, *data["steps"][:-1]], data["steps"], strict=True):
        points = 100 * (before["paper"] - step["paper"]) / first["paper"]
        cells.append(
            [
                step["name"],
                f"{step['paper'] / 1e9:,.1f}",
                f"{100 * step['paper'] / first['paper']:.2f} %",
                f"{0.0 - round(points, 2):.2f}" if step is not first else "",
                f"{100 * step['all'] / first['all']:.2f} %",
                f"Base, L=22, MLP 0.75, T=56, N=5, 26 text tokens, {data['conditions']}",
            ]
        )
    return _table(("after", "GFLOP, `paper`", "of upstream", "points", "`all`", "conditions"), cells, left=1)


def latency(stem: str, *, components: bool = False) -> Callable[[Path], list[str]]:
    """Return the function that writes the table of one latency run, with the times of the components if wished."""

    def make(results: Path) -> list[str]:
        data = _read(results / f"{stem}.json")
        conditions, entries = data["conditions"], data["entries"]
        summary = (
            f"{conditions['threads of torch']} thread(s), {conditions['processor']}, {conditions['versions']},"
            f" batch 1, {conditions['calls'].split(' of each')[0]} runs, {conditions['date'].split()[0]}"
        )
        cells = [
            [
                entry["row"],
                entry["backend"],
                f"{entry['latency']['median']:,.0f}"
                if entry["latency"]["median"] >= 1000
                else f"{entry['latency']['median']:.1f}",
                f"{entry['latency']['p95']:,.0f}"
                if entry["latency"]["p95"] >= 1000
                else f"{entry['latency']['p95']:.1f}",
                *(f"{milliseconds:.1f}" for milliseconds in entry["latency"]["modules"] if components),
                f"{entry['speed_up']:.2f}x",
                f"{entry['flops'] / 1e9:.1f}",
                f"{entry['weight_bytes'] / 1e6:,.0f}",
                summary,
            ]
            for entry in entries
        ]
        parts = [f"{name} ms" for name in COMPONENTS if components]
        header = ("policy", "backend", "median ms", "p95 ms", *parts, "speed-up", "GFLOP", "weights MB", "conditions")
        return _table(header, cells, left=2)

    return make


def full_size(results: Path) -> list[str]:
    """Return time and memory of each stage at full size."""
    data = _read(results / "full-size.json")
    cells = []
    for stage, found in data["stages"].items():
        figures = dict(found["measured"])
        peak, mapped = figures.pop("peak memory, GB"), figures.pop("with mapped files, GB")
        measured = "; ".join(
            f"{name}: {value:.1e}" if "error" in name else f"{name}: {value:.4g}" for name, value in figures.items()
        )
        cells.append([stage, measured, f"{peak:.2f}", f"{mapped:.1f}", f"{found['machine']}, {found['date']}"])
    return _table(("stage", "measured", "peak GB", "with mapped files GB", "conditions"), cells, left=2)


def calibration_cost(results: Path) -> list[str]:
    """Return time and memory of calibration with repair at full size."""
    cells = []
    for found in _read(results / "calibration-cost.json"):
        measured = found["measured"]
        settings = measured["settings"]
        strengths = "one strength" if settings["repair_rho"] is not None else "all strengths"
        cells.append(
            [
                f"{measured['frames']} frames, repair of {settings['repair']}, {strengths},"
                f" weights {measured['weights']}",
                f"{measured['seconds']:.0f}",
                measured["own memory at most"],
                measured.get("GPU memory at most", "-"),
                bytes_text(measured["refit tensors"]),
                f"CogACT-Base, bfloat16, {found['machine']}, {found['date']}",
            ]
        )
    header = ("calibration", "s", "own memory", "GPU memory", "refit weights", "conditions")
    return _table(header, cells, left=1)


def compile_and_export(results: Path) -> list[str]:
    """Return the seconds between a policy in memory and its first actions."""
    data = _read(results / "compile-and-export.json")
    names = list(dict.fromkeys(name for times in data["seconds"].values() for name in times))
    cells = [
        [
            variant,
            *(f"{times[name]:.1f}" if name in times else "-" for name in names),
            f"{data['machine']}, {data['date']}",
        ]
        for variant, times in data["seconds"].items()
    ]
    return _table(("seconds", *names, "conditions"), cells, left=1)


def closed_loop(name: str) -> Callable[[Path], list[str]]:
    """Return the function that writes the table of success in simulation, by variant, of one results file."""
    return lambda results: _closed_loop(_read(results / f"{name}.json"))


def _closed_loop(data: Mapping[str, Any]) -> list[str]:
    cells = []
    for name, found in data["variants"].items():
        success, paired = found["all"]["success"], found["paired"]
        rate = 100 * success["successes"] / success["episodes"]
        cells.append(
            [
                f"`{name}`",
                f"{rate:.1f} [{100 * success['low']:.0f}, {100 * success['high']:.0f}]",
                f"{100 * paired['difference']:+.1f} [{100 * paired['low']:+.1f}, {100 * paired['high']:+.1f}]"
                if paired
                else "",
                f"{paired['p_value']:.2g}" if paired else "",
                f"{found['flops'] / 1e9:.2f}",
                f"{found['all']['milliseconds']:.1f}",
                f"{success['episodes']} episodes, {data['machine']}, {data['date']}",
            ]
        )
    against = f"against {data['reference']}, points"
    header = ("variant", "success %", against, "McNemar's p", "GFLOP", "ms a call", "conditions")
    return _table(header, cells, left=1)


def without_task(results: Path) -> list[str]:
    """Return what a repair does to a task of which calibration has no frames, each task in turn."""
    cells = []
    for task, data in _read(results / "closed-loop-without-task.json").items():
        variants = data["variants"]
        left_out = f"coverage-repair-without-{task}"
        rates = []
        for name in ("dense", "coverage", "coverage-repair", left_out):
            success = variants[name]["all"]["success"]
            rates.append(f"{100 * success['successes'] / success['episodes']:.0f}")
        paired = variants[left_out]["paired"]
        cells.append(
            [
                task,
                *rates,
                f"{100 * paired['difference']:+.0f} [{100 * paired['low']:+.0f}, {100 * paired['high']:+.0f}]",
                f"{success['episodes']} episodes, success in %, {data['machine']}, {data['date']}",
            ]
        )
    kinds = ("dense", "not repaired", "repaired", "repaired without its frames", "of these, against dense, points")
    return _table(("task", *kinds, "conditions"), cells, left=1)


def screened(results: Path) -> list[str]:
    """Return the latency of variants that were timed in turn, and their speed-up over each dense one."""
    data = _read(results / "closed-loop-screen.json")
    rows = {row["variant"]: row for row in data["rows"]}
    dense = [name for name in rows if name.startswith("dense")]
    cells = [
        [
            f"`{name}`",
            f"{row['milliseconds']:.2f}",
            *(f"{rows[each]['milliseconds'] / row['milliseconds']:.2f}x" for each in dense),
            f"{row['gflop']:.2f}",
            f"{data['calls']} calls each, {data['machine']}, {data['date']}",
        ]
        for name, row in rows.items()
    ]
    return _table(("variant", "median ms", *(f"of `{each}`" for each in dense), "GFLOP", "conditions"), cells, left=1)


def layer_redundancy(results: Path) -> list[str]:
    """Return the perplexity of SmolLM2 with layers dropped by several rules."""
    data = _read(results / "layer-redundancy-smollm2-135m.json")
    cells = [
        [
            str(row["dropped"]),
            *(f"{value:,.1f}" for value in (row["importance"], row["block"], median(row["random"]), row["last"])),
            ", ".join(map(str, row["importance_layers"])),
            data["conditions"][1],
        ]
        for row in data["rows"]
    ]
    cells.insert(0, ["0", *[f"{data['dense']:,.1f}"] * 4, "-", data["conditions"][1]])
    kinds = ("least important", "contiguous block", "random, median", "last")
    return _table(("dropped", *kinds, "the least important ones", "conditions"), cells, left=0)


def repair_language_model(results: Path) -> list[str]:
    """Return the perplexity of SmolLM2 with layers and neurons taken out, without repair and with it."""
    data = _read(results / "repair-smollm2-135m.json")
    dense, conditions = data["dense"], "; ".join(data["conditions"])
    cells = [["nothing", f"{dense:.1f}", "", "", "", "", "", conditions]]
    for row in data["rows"]:
        rises = [math.log(row[name] / dense) for name in ("without", "repaired")]
        cells.append(
            [
                row["compression"],
                *(f"{row[name]:.1f}" for name in ("without", "repaired")),
                *(f"{rise:.3f}" for rise in rises),
                f"{rises[1] / rises[0]:.2f}",
                f"{row['rho']:g}",
                conditions,
            ]
        )
    kinds = ("perplexity", "repaired", "rise of its logarithm", "repaired", "ratio", "rho")
    return _table(("taken out", *kinds, "conditions"), cells, left=1)


TABLES: Mapping[str, Callable[[Path], list[str]]] = MappingProxyType(
    {
        "paper": paper,
        "steps": steps,
        "latency-base": latency("latency-base-cuda-bfloat16", components=True),
        "latency-demo": latency("latency-demo-cpu-float32"),
        "latency-mid": latency("latency-mid-cpu-float32"),
        "full-size": full_size,
        "calibration-cost": calibration_cost,
        "compile-and-export": compile_and_export,
        "closed-loop": closed_loop("closed-loop"),
        "closed-loop-confirmation": closed_loop("closed-loop-confirmation"),
        "closed-loop-repair": closed_loop("closed-loop-repair"),
        "closed-loop-frontier": closed_loop("closed-loop-frontier"),
        "closed-loop-screen": screened,
        "closed-loop-repair-ablation": closed_loop("closed-loop-repair-ablation"),
        "closed-loop-without-task": without_task,
        "layer-redundancy": layer_redundancy,
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


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lay out rows that end with their conditions; conditions that all rows share are written once, below."""
    last = len(header) - 1
    rule = ["---" if number < left or number == last else "---:" for number in range(len(header))]
    lines = (header, rule, *rows)
    shared = {row[last] for row in rows}
    if len(shared) > 1:
        return [f"| {' | '.join(cells)} |" for cells in lines]
    return [*(f"| {' | '.join(cells[:last])} |" for cells in lines), "", f"Conditions of every row: {shared.pop()}."]


if __name__ == "__main__":
    sys.exit(main())
