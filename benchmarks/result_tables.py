"""The rows of every table in README and docs, made from the files in benchmarks/results with their conditions."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.latency.components import COMPONENTS
from evla_compile.units import bytes_text


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
    return lay_out(header, cells, left=1)


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
    return lay_out(("after", "GFLOP, `paper`", "of upstream", "points", "`all`", "conditions"), cells, left=1)


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
        return lay_out(header, cells, left=2)

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
    return lay_out(("stage", "measured", "peak GB", "with mapped files GB", "conditions"), cells, left=2)


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
    return lay_out(header, cells, left=1)


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
    return lay_out(("seconds", *names, "conditions"), cells, left=1)


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
    return lay_out(header, cells, left=1)


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
    return lay_out(("task", *kinds, "conditions"), cells, left=1)


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
    return lay_out(("variant", "median ms", *(f"of `{each}`" for each in dense), "GFLOP", "conditions"), cells, left=1)


def fidelity_ranks(results: Path) -> list[str]:
    """Return how well each figure of fidelity ranks variants as the closed loop does, by the frames it is taken on."""
    data = _read(results / "fidelity-ranks.json")
    names = list(data["frames"])
    cells = [
        [
            row["figure"],
            *(
                f"{row[name]['value']:.2f} [{row[name]['interval'][0]:.2f}, {row[name]['interval'][1]:.2f}]"
                for name in names
            ),
            f"{len(data['variants'])} variants, {data['draws']} noises a frame, {data['machine']}, {data['date']}",
        ]
        for row in data["correlations"]
    ]
    counts = (
        f"{'both' if name == 'both' else f'the {name}'}, {count} frames" for name, count in data["frames"].items()
    )
    return lay_out(("figure", *counts, "conditions"), cells, left=1)


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
    return lay_out(("dropped", *kinds, "the least important ones", "conditions"), cells, left=0)


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
    return lay_out(("taken out", *kinds, "conditions"), cells, left=1)


def _read(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf-8"))


def lay_out(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int) -> list[str]:
    """Lay out rows that end with their conditions; conditions that all rows share are written once, below."""
    last = len(header) - 1
    rule = ["---" if number < left or number == last else "---:" for number in range(len(header))]
    lines = (header, rule, *rows)
    shared = {row[last] for row in rows}
    if len(shared) > 1:
        return [f"| {' | '.join(cells)} |" for cells in lines]
    return [*(f"| {' | '.join(cells[:last])} |" for cells in lines), "", f"Conditions of every row: {shared.pop()}."]
