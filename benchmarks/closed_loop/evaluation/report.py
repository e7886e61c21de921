"""Episodes to tables: success, paired differences, latency and deviation, as JSON, Markdown and a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from rich import box
from rich.table import Table

from benchmarks.closed_loop.evaluation.paired_statistics import PairedDifference, Rate, paired_difference, success_rate
from benchmarks.closed_loop.evaluation.rollout import Deviation, EpisodeResult
from benchmarks.closed_loop.evaluation.variants import Prepared

_EMPTY = 30.0
"""Smallest gap in success, in percentage points, that the plot leaves out."""
_BY_TASK = "Success by task in %, with Wilson's 95 % interval"


def summarize(
    episodes: Sequence[EpisodeResult],
    deviations: Sequence[Deviation],
    prepared: Mapping[str, Prepared],
    reference: str,
) -> dict[str, Any]:
    """Return the results by variant, JSON-ready.

    Args:
        episodes: what ran.
        deviations: distances from the reference along its own episodes; may be empty.
        prepared: the variants, in the order of the tables.
        reference: the variant that the others are compared with, episode by episode.
    """
    by_variant = {name: [episode for episode in episodes if episode.variant == name] for name in prepared}
    results = {}
    for name, found in by_variant.items():
        if not found:
            continue
        tasks = list(dict.fromkeys(episode.task for episode in found))
        apart = [deviation.millimetres for deviation in deviations if deviation.variant == name]
        results[name] = {
            "config": prepared[name].config,
            "flops": prepared[name].flops,
            "noise": prepared[name].variant.noise,
            "all": _row(found),
            "tasks": {task: _row([episode for episode in found if episode.task == task]) for task in tasks},
            "deviation_mm": mean(apart) if apart else None,
            "paired": None if name == reference else asdict(_compare(by_variant[reference], found)),
        }
    return results


def to_markdown(results: Mapping[str, Any], reference: str, conditions: Sequence[str]) -> str:
    """Return the results as Markdown tables: variants against the reference, success by task, layers kept."""
    lines = ["# Closed loop in Meta-World", "", *(f"- {condition}" for condition in conditions), ""]
    lines += _markdown_table(_variant_rows(results, reference))
    lines += ["", f"{_BY_TASK}:", "", *_markdown_table(_task_rows(results))]
    most, *rows = _layer_rows(results)
    if rows:
        lines += ["", f"{most}:", "", *_markdown_table(rows)]
    return "\n".join(lines) + "\n"


def console_tables(results: Mapping[str, Any], reference: str) -> list[Table]:
    """Return the tables of `to_markdown`, that of the variants in two, for a terminal of 80 columns."""
    rows = _variant_rows(results, reference)
    tables = [
        _console_table("Success", [row[:5] for row in rows]),
        _console_table("Cost", [[row[0], *row[5:]] for row in rows]),
        _console_table(_BY_TASK, _task_rows(results)),
    ]
    most, *rows = _layer_rows(results)
    return [*tables, _console_table(most, rows)] if rows else tables


def _variant_rows(results: Mapping[str, Any], reference: str) -> list[Sequence[str]]:
    """Return header and rows of the variants over all tasks: five columns of success, then four of cost."""
    rows: list[Sequence[str]] = [
        (
            *("variant", "success %", f"against {reference}, points", "lost / gained", "McNemar's p"),
            *("GFLOP", "ms a call", "steps", "actions apart, mm"),
        )
    ]
    for name, result in results.items():
        row, paired = result["all"], result["paired"]
        compared = ["", "", ""]
        if paired is not None:
            difference = PairedDifference(**paired)
            ends = f"[{100 * difference.low:+.1f}, {100 * difference.high:+.1f}]"
            compared = [
                f"{100 * difference.difference:+.1f} {ends}",
                f"{difference.lost} / {difference.gained}",
                f"{difference.p_value:.2g}",
            ]
        rows.append(
            [
                name,
                _rate(Rate(**row["success"])),
                *compared,
                "" if result["flops"] is None else f"{result['flops'] / 1e9:.2f}",
                f"{row['milliseconds']:.1f}",
                f"{row['steps']:.0f}",
                "" if result["deviation_mm"] is None else f"{result['deviation_mm']:.2f}",
            ]
        )
    return rows


def _task_rows(results: Mapping[str, Any]) -> list[Sequence[str]]:
    tasks = list(next(iter(results.values()))["tasks"])
    rows: list[Sequence[str]] = [("variant", *tasks)]
    for name, result in results.items():
        rows.append([name, *(_rate(Rate(**result["tasks"][task]["success"])) for task in tasks)])
    return rows


def _layer_rows(results: Mapping[str, Any]) -> tuple[str, *tuple[Sequence[str], ...]]:
    """Return a title, and header and rows of the variants that drop decoder layers, if any does."""
    found = {name: result["config"].get("keep_layers") for name, result in results.items()}
    kept = {name: layers for name, layers in found.items() if isinstance(layers, list)}
    most = max(map(len, kept.values()), default=0)
    rows = [(name, ", ".join(map(str, layers))) for name, layers in kept.items() if len(layers) < most]
    return f"Decoder layers kept of {most}", *([("variant", "layers"), *rows] if rows else [])


def _markdown_table(rows: Sequence[Sequence[str]]) -> list[str]:
    header, *body = [f"| {' | '.join(row)} |" for row in rows]
    return [header, f"|{'---|' * len(rows[0])}", *body]


def _console_table(title: str, rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(rows[0][0], no_wrap=True)
    for name in rows[0][1:]:
        table.add_column(name.replace("-", "-\n"), overflow="fold")
    for row in rows[1:]:
        table.add_row(*row)
    return table


def draw_plot(results: Mapping[str, Any], reference: str, file: Path) -> None:
    """Draw success over FLOPs and over measured latency, as a PNG; numbers name the variants.

    Where no variant succeeds within 30 points and more, the axis is broken there, and what remains is drawn larger.
    """
    from matplotlib.colors import to_rgb  # noqa: PLC0415  # of the extra `bench`
    from matplotlib.figure import Figure  # noqa: PLC0415

    rates = {name: Rate(**result["all"]["success"]) for name, result in results.items()}
    spans = _spans([100 * end for rate in rates.values() for end in (rate.low, rate.high)])
    figure = Figure(figsize=(14, 10), layout="constrained")
    panels = figure.subplots(
        len(spans), 2, sharex="col", sharey="row", squeeze=False, height_ratios=[high - low for low, high in spans]
    )
    colors = {
        name: "black" if name == reference else "tab:red" if _is_control(name) else "tab:blue" for name in results
    }
    columns = (
        ("GFLOP a call", {name: _giga(result["flops"]) for name, result in results.items()}),
        ("ms a call (median)", {name: result["all"]["milliseconds"] for name, result in results.items()}),
    )
    for (low, high), row in zip(spans, panels, strict=True):
        for panel, (_, places) in zip(row, columns, strict=True):
            for name, rate in rates.items():
                if places[name] is not None and low <= 100 * rate.value <= high:
                    ends = [[100 * (rate.value - rate.low)], [100 * (rate.high - rate.value)]]
                    panel.errorbar(
                        *(places[name], 100 * rate.value),
                        yerr=ends,
                        fmt="o",
                        markersize=4 if name != reference else 7,
                        elinewidth=0.8,
                        color=colors[name],
                        ecolor=(*to_rgb(colors[name]), 0.25),
                    )
            panel.set_xlim(0, 1.06 * max((place for place in places.values() if place is not None), default=1.0))
            panel.set_ylim(low, high)
            panel.grid(visible=True, linewidth=0.3)
    for panel, (label, _) in zip(panels[-1], columns, strict=True):
        panel.set_xlabel(label)
    figure.supylabel("episodes solved, %" + (" (axis broken)" if len(spans) > 1 else ""))
    names = "\n".join(f"{number:2}  {name}" for number, name in enumerate(results, start=1))
    panels[0][1].annotate(names, (1.03, 1.0), xycoords="axes fraction", va="top", fontsize=8, family="monospace")
    panels[0][0].set_title("black: the reference; red: controls; bars: Wilson's 95 % interval", fontsize=8, loc="left")
    figure.canvas.draw()  # labels are placed in pixels, which the layout decides
    for (low, high), row in zip(spans, panels, strict=True):
        for panel, (_, places) in zip(row, columns, strict=True):
            points = {
                number: (places[name], 100 * rates[name].value, colors[name])
                for number, name in enumerate(results, start=1)
                if places[name] is not None and low <= 100 * rates[name].value <= high
            }
            _number(panel, points)
    figure.savefig(file, dpi=figure.dpi)


def _spans(ends: Sequence[float]) -> list[tuple[float, float]]:
    """Return the intervals of the axis to draw, in %, upper first: all of it, or two if much between them is empty.

    Args:
        ends: lower and upper end of every interval, in turn.
    """
    intervals = sorted(zip(ends[::2], ends[1::2], strict=True))
    covered = intervals[0][1]
    for low, high in intervals[1:]:
        if low - covered >= _EMPTY:
            return [(low - 2, 100.0), (0.0, covered + 2)]
        covered = max(covered, high)
    return [(0.0, 100.0)]


def _number(panel: Any, points: Mapping[int, tuple[float, float, str]]) -> None:
    """Write the number of every point beside it, where no other point and no other number is."""
    taken = [panel.transData.transform((x, y)) for x, y, _ in points.values()]
    for number, (x, y, color) in points.items():
        start = panel.transData.transform((x, y))
        radii, angles = (11, 17, 24, 32, 42, 54), np.arange(0, 2 * np.pi, np.pi / 6)
        offsets = [np.array([r * np.cos(angle), r * np.sin(angle)]) for r in radii for angle in angles]
        free = (
            offset
            for offset in offsets
            if all(abs(start + offset - other)[0] > 13 or abs(start + offset - other)[1] > 10 for other in taken)
        )
        offset = next(free, offsets[0])
        taken.append(start + offset)
        panel.annotate(
            *(str(number), (x, y), offset),
            textcoords="offset pixels",
            arrowprops={"arrowstyle": "-", "linewidth": 0.4, "color": color, "shrinkA": 0, "shrinkB": 0},
            ha="center",
            va="center",
            fontsize=7,
            color=color,
        )


def _row(episodes: Sequence[EpisodeResult]) -> dict[str, Any]:
    times = [time for episode in episodes for time in episode.milliseconds]
    return {
        "success": asdict(success_rate(sum(episode.success for episode in episodes), len(episodes))),
        "steps": mean(episode.steps for episode in episodes),
        "milliseconds": float(np.median(times)) if times else None,
        "milliseconds_p95": float(np.percentile(times, 95)) if times else None,
        "calls_timed": len(times),
    }


def _compare(reference: Sequence[EpisodeResult], variant: Sequence[EpisodeResult]) -> PairedDifference:
    outcomes = [{(e.task, e.seed): e.success for e in episodes} for episodes in (reference, variant)]
    return paired_difference(outcomes[0], outcomes[1])


def _rate(rate: Rate) -> str:
    return f"{100 * rate.value:.1f} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _giga(flops: int | None) -> float | None:
    return None if flops is None else flops / 1e9


def _is_control(name: str) -> bool:
    return name.startswith(("random-", "last-"))
