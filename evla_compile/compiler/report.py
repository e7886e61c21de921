"""Report of a compilation: operators, FLOPs and weights after each pass, and the deviation from the dense policy."""

from dataclasses import asdict, dataclass
from typing import Any

from evla_compile.fidelity.measure import Fidelity
from evla_compile.graph.contract import GraphStats, PassReport
from evla_compile.settings.budgets.budget import decision_of
from evla_compile.settings.budgets.repair import RepairDecision
from evla_compile.settings.budgets.vision import VisionDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan
from evla_compile.units import byte_scale, bytes_text, flop_scale


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
class RepairReport:
    """What calibration's repair did."""

    decision: RepairDecision
    """What was taken, and what all trials came to."""
    size: int
    """Bytes of the refit weights, in the plan's safetensors file."""

    @classmethod
    def of(cls, plan: Plan) -> "RepairReport | None":
        """Return the report of a plan; None where no repair was asked for."""
        decision = decision_of(RepairDecision, plan.decisions)
        size = 0 if plan.tensor_file is None else plan.tensor_file.size
        return cls(decision=decision, size=size) if decision.trials else None

    def lines(self) -> list[str]:
        """Return what to tell of it, a sentence or two and each warning."""
        found = self.decision
        before, after = found.trials[0].deviation, found.chosen.deviation
        of = f"the actions on {found.held_out} held-out frames are"
        if not found.layers:
            lines = [
                f"repair: nothing is refit, since no fit on {found.fitted} frames helps: {of} {before:.4f} from the"
                " dense policy's, mean of the absolute differences, normalised to [-1,1]"
            ]
        else:
            layers = f"layer{'s' * (len(found.layers) > 1)} {', '.join(map(str, found.layers))}"
            are = "are" if len(found.layers) > 1 else "is"
            lines = [
                f"repair: {layers} {are} refit (rho {found.rho:g}, {bytes_text(self.size)}) on {found.fitted}"
                f" frames: {of} {after:.4f} from the dense policy's, {before:.4f} unrepaired, mean of the absolute"
                " differences, normalised to [-1,1]"
            ]
        return [*lines, *(f"repair, warning: {warning}" for warning in found.warnings)]


@dataclass(frozen=True, kw_only=True, slots=True)
class VisionReport:
    """What the cut of the vision towers did."""

    blocks: int
    """Blocks that were cut."""
    neurons: tuple[int, ...]
    """Neurons that stay in each."""
    refit: int
    """Blocks of which the second layer was refit."""
    moved: tuple[float, float]
    """How far the cut moves what leaves a block on held-out frames, without and with the refit, over its norm; the
    largest of all blocks."""

    @classmethod
    def of(cls, plan: Plan) -> "VisionReport | None":
        """Return the report of a plan; None where nothing was cut."""
        decision = decision_of(VisionDecision, plan.decisions)
        if not decision.blocks:
            return None
        before, after = (max(block.moved[place] for block in decision.blocks) for place in (0, 1))
        return cls(
            blocks=len(decision.blocks),
            neurons=tuple(len(block.neurons) for block in decision.blocks),
            refit=len(decision.refit),
            moved=(before, after),
        )

    def line(self) -> str:
        """Return what to tell of it, a sentence."""
        widths = " or ".join(map(str, sorted(set(self.neurons))))
        before, after = self.moved
        return (
            f"vision: {widths} neurons stay in each of {self.blocks} MLPs, of which {self.refit} are refit: what leaves"
            f" a block moves by {after:.1%} of its norm at most on held-out frames, by {before:.1%} unless refit"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileReport:
    """What a compilation did."""

    config: CompileConfig
    """The settings."""
    passes: tuple[PassReport, ...]
    """One report a pass, in order."""
    deviations: tuple[StageDeviation, ...]
    """Distance from the dense policy; empty where no calibration frames were given."""
    repair: RepairReport | None = None
    """What the repair did; None where there was none."""
    fidelity: Fidelity | None = None
    """Distance of the actions from the dense policy's on all frames; None where none were given."""
    vision: VisionReport | None = None
    """What the cut of the vision towers did; None where there was none."""

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON-ready values."""
        return {
            "config": self.config.to_json(),
            "passes": [asdict(report) for report in self.passes],
            "deviations": [asdict(deviation) for deviation in self.deviations],
            "fidelity": None if self.fidelity is None else self.fidelity.to_json(),
            "repair": None if self.repair is None else asdict(self.repair),
            "vision": None if self.vision is None else asdict(self.vision),
        }

    def fidelity_lines(self) -> list[str]:
        """Return the headline of the fidelity and how to read it; nothing where it was not measured."""
        return [] if self.fidelity is None else [self.fidelity.line(), self.fidelity.how_to_read()]

    def repair_lines(self) -> list[str]:
        """Return what to tell of the refits of vision and decoder, and each warning; nothing where there was none."""
        vision = [] if self.vision is None else [self.vision.line()]
        return [*vision, *([] if self.repair is None else self.repair.lines())]

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
        return "\n".join([*lines, *self.fidelity_lines(), *self.repair_lines()])
