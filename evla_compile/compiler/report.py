"""Report of a compilation: operators, FLOPs and weights after each pass, and the deviation from the dense policy."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from evla_compile.graph.contract import GraphStats, PassReport
from evla_compile.settings.config import CompileConfig
from evla_compile.units import byte_scale, flop_scale

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, kw_only=True, slots=True)
class StageDeviation:
    """How far one stage of the compiled policy is from the dense one."""

    stage: str
    """`cognition`, `samples` (raw) or `actions` (samples clipped to [-1,1])."""
    relative: float
    """Largest absolute difference over the largest absolute value of the dense policy; the worst frame."""
    frames: int
    """Observations compared."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileReport:
    """What a compilation did."""

    config: CompileConfig
    """The settings."""
    passes: tuple[PassReport, ...]
    """One report a pass, in order."""
    deviations: tuple[StageDeviation, ...]
    """Distance from the dense policy; empty where no calibration frames were given."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "config": self.config.to_json(),
            "passes": [asdict(report) for report in self.passes],
            "deviations": [asdict(deviation) for deviation in self.deviations],
        }

    def rows(self) -> list[tuple[str, str, str, str, str, str]]:
        """Return the table of passes as text, its header first: name, kind, changes, operators, FLOPs and weights."""
        captured = self.passes[0].before
        stats = (captured, *(report.after for report in self.passes))
        work, size = flop_scale(each.flops for each in stats), byte_scale(each.weight_bytes for each in stats)

        def shown(each: GraphStats) -> tuple[str, str, str]:
            return str(each.ops), work.show(each.flops), size.show(each.weight_bytes)

        rows = [("pass", "kind", "changes", "ops", work.unit, f"weights {size.unit}")]
        rows.append(("captured (one denoising step)", "", "", *shown(captured)))
        for report in self.passes:
            kind = "exact" if report.exact else "lossy"
            rows.append((report.name, kind, str(report.changes), *shown(report.after)))
        return rows

    def __str__(self) -> str:
        table = self.rows()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if column < 2 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        ]
        lines += [
            f"{deviation.stage}: {deviation.relative:.2e} of the dense policy's largest value away from it, worst of"
            f" {deviation.frames} frames"
            for deviation in self.deviations
        ] or ["deviation from the dense policy: not measured; give calibration frames, beside a plan too"]
        return "\n".join(lines)
