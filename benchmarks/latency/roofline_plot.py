"""Draws measured policies under the roof of the device that ran them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.latency.report import Entry
from evla_compile.estimate.devices import Device

_MARKERS = "osD^vP"
_COLUMN = 1.03
_LINE_HEIGHT = 0.045


def draw_roofline(entries: Sequence[Entry], roof: Device, dtype: str, title: str, path: Path) -> None:
    """Write a PNG: arithmetic intensity against achieved TFLOP/s, a colour a row and a marker a backend.

    Args:
        entries: what was measured.
        roof: the device.
        dtype: "float32" or "bfloat16", whose peak is the roof.
        title: heading.
        path: the file.
    """
    figure = Figure(figsize=(11, 6.5), dpi=150)
    axes = figure.subplots()
    figure.subplots_adjust(left=0.1, right=0.78, bottom=0.1, top=0.92)
    intensities = [entry.flops / entry.read_bytes for entry in entries]
    achieved = [entry.flops_per_second / 1e12 for entry in entries]
    peak, bandwidth = {"float32": roof.float32_flops, "bfloat16": roof.bfloat16_flops}[dtype], roof.bandwidth
    ridge = peak / bandwidth
    x = np.geomspace(min(*intensities, ridge) / 3, max(*intensities, ridge) * 3, 200)
    axes.loglog(x, np.minimum(peak, bandwidth * x) / 1e12, color="black")
    axes.axvline(ridge, color="black", linewidth=0.6, linestyle=":")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(min(achieved) / 3, peak / 1e12 * 2)
    rows = list(dict.fromkeys(entry.row for entry in entries))
    backends = list(dict.fromkeys(entry.backend for entry in entries))
    colors = {row: to_hex(colormaps["tab20"](index % 20)) for index, row in enumerate(rows)}
    for entry, intensity, rate in zip(entries, intensities, achieved, strict=True):
        marker = _MARKERS[backends.index(entry.backend)]
        axes.plot(intensity, rate, marker, color=colors[entry.row], markersize=7, markeredgecolor="black", zorder=3)
    axes.set_title(title)
    axes.set_xlabel("FLOP per byte of weights read")
    axes.set_ylabel("TFLOP/s")
    axes.grid(visible=True, which="both", linewidth=0.3)
    note = f"{roof.name}\n{peak / 1e12:.3g} TFLOP/s {dtype}, {bandwidth / 1e9:.4g} GB/s"
    opaque = {"facecolor": "white", "edgecolor": "none"}
    axes.annotate(note, (0.02, 0.97), xycoords="axes fraction", va="top", fontsize=8, bbox=opaque)
    handles = [
        Line2D([], [], linestyle="", marker=_MARKERS[index], color="grey", markeredgecolor="black", label=backend)
        for index, backend in enumerate(backends)
    ]
    axes.legend(handles=handles, loc="lower left", fontsize=8)
    fastest = {
        row: max((r, i) for e, i, r in zip(entries, intensities, achieved, strict=True) if e.row == row) for row in rows
    }
    _label(axes, {row: (intensity, rate) for row, (rate, intensity) in fastest.items()}, colors)
    figure.savefig(path)


def _label(axes: Axes, points: dict[str, tuple[float, float]], colors: dict[str, str]) -> None:
    """Write the rows' names in a column beside the plot, highest point first, a line leading to each point."""
    low, high = np.log(axes.get_ylim())
    ordered = sorted(points.items(), key=lambda item: -item[1][1])
    places, place = list[float](), 1.0
    for _, (_, rate) in ordered:
        place = min(float((np.log(rate) - low) / (high - low)), place - _LINE_HEIGHT)
        places.append(place)
    raised = max(0.0, -places[-1])
    for (row, point), place in zip(ordered, places, strict=True):
        axes.annotate(
            row,
            point,
            xytext=(_COLUMN, place + raised),
            textcoords="axes fraction",
            va="center",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "color": colors[row], "linewidth": 0.6, "relpos": (0.0, 0.5)},
            annotation_clip=False,
        )
