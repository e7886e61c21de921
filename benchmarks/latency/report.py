"""Write the results: every measured number as JSON, and a table of them in Markdown."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from benchmarks.latency.components import COMPONENTS, Cost
from benchmarks.latency.timing import Latency
from evla_compile.estimate.devices import Device
from evla_compile.graph.flops import Component

COLUMNS = (
    "policy",
    "backend",
    "median ms",
    "p95",
    "p99",
    *(f"{component} ms" for component in COMPONENTS),
    "GFLOP",
    "weights GB",
    "TFLOP/s",
    "GB/s",
    "bound ms",
    "x bound",
    "peak GB",
    "error",
    "speed-up",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """One row on one backend, measured."""

    row: str
    """The row's names."""
    backend: str
    """The backend."""
    latency: Latency
    """Its times."""
    costs: Mapping[Component, Cost]
    """Cost of each component."""
    weight_bytes: int
    """Bytes of its weights."""
    bound_seconds: float
    """Roofline bound of a call."""
    peak_bytes: int | None
    """Peak of weights and other GPU memory; None on a CPU, where rows share one process."""
    error: float | None
    """Relative error against the row's eager graph, the worst of the inputs compared; None for that graph itself."""

    @property
    def flops(self) -> int:
        """Floating-point operations of a call."""
        return sum(cost.flops for cost in self.costs.values())

    @property
    def read_bytes(self) -> int:
        """Bytes of the weights that a call reads."""
        return sum(cost.read_bytes for cost in self.costs.values())

    @property
    def flops_per_second(self) -> float:
        """Floating-point operations per second of the median call."""
        return 1e3 * self.flops / self.latency.median

    @property
    def bytes_per_second(self) -> float:
        """Bytes of weights read per second of the median call, each counted once."""
        return 1e3 * self.read_bytes / self.latency.median


def to_json(entries: Sequence[Entry], conditions: Mapping[str, Any], roof: Device) -> str:
    """Return everything measured, and its conditions, as JSON."""
    measured = [
        asdict(entry)
        | {
            "flops": entry.flops,
            "read_bytes": entry.read_bytes,
            "flops_per_second": entry.flops_per_second,
            "bytes_per_second": entry.bytes_per_second,
            "speed_up": entries[0].latency.median / entry.latency.median,
        }
        for entry in entries
    ]
    return json.dumps({"conditions": dict(conditions), "roof": asdict(roof), "entries": measured}, indent=1) + "\n"


def to_markdown(entries: Sequence[Entry], conditions: Mapping[str, str], roof: Device, title: str) -> str:
    """Return a table of what was measured, and its conditions, as Markdown."""
    lines = [f"# {title}", "", _line(COLUMNS), _line(["---", "---", *["---:"] * (len(COLUMNS) - 2)])]
    lines += [_line(_cells(entry, entries[0])) for entry in entries]
    lines += ["", *(f"- {name}: {value}" for name, value in conditions.items())]
    lines += [
        f"- bound: {roof.name}, {roof.bandwidth / 1e9:.4g} GB/s, {roof.float32_flops / 1e12:.4g} TFLOP/s in float32,"
        f" {roof.bfloat16_flops / 1e12:.4g} in bfloat16 ({roof.source}). It is the sum over the modules of the larger"
        " of computing their operations and reading their weights once; the action head counts as float32."
    ]
    return "\n".join(lines) + "\n"


def _cells(entry: Entry, first: Entry) -> list[str]:
    latency, bound = entry.latency, 1e3 * entry.bound_seconds
    return [
        entry.row,
        entry.backend,
        *(f"{value:.2f}" for value in (latency.median, latency.p95, latency.p99)),
        *([f"{value:.2f}" for value in latency.modules] or ["-"] * len(COMPONENTS)),
        f"{entry.flops / 1e9:,.1f}",
        f"{entry.weight_bytes / 1e9:.3f}",
        f"{entry.flops_per_second / 1e12:.3g}",
        f"{entry.bytes_per_second / 1e9:.3g}",
        f"{bound:.2f}",
        f"{latency.median / bound:.2f}",
        "-" if entry.peak_bytes is None else f"{entry.peak_bytes / 1e9:.2f}",
        "-" if entry.error is None else f"{entry.error:.1e}",
        f"{first.latency.median / latency.median:.2f}x",
    ]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
