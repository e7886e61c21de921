"""What a compilation did: per pass operators, FLOPs and weights, per stage the distance from the dense policy."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from evla_compile import host
from evla_compile.config import CompileConfig
from evla_compile.graph import GraphStats, PassReport
from evla_compile.model.policy import CogACT
from evla_compile.processor import draw_noise
from evla_compile.tolerances import relative_error
from evla_compile.torch_state import own_torch_state
from evla_compile.units import byte_scale, flop_scale

if TYPE_CHECKING:
    from evla_compile.compiled import CompiledPolicy
    from evla_compile.frames import Frame


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


@own_torch_state()
def measure_deviations(
    policy: CogACT, compiled: "CompiledPolicy", frames: "Sequence[Frame]"
) -> tuple[StageDeviation, ...]:
    """Run both policies on `frames` from the same noise, that of seed 0, and compare them stage by stage."""
    config = compiled.config
    device = next(policy.parameters()).device
    worst = dict.fromkeys(("cognition", "samples", "actions"), 0.0)
    for batch in host.observations(frames, config.batch_size):
        inputs = host.prepare(
            policy.processor,
            [image for image, _ in batch],
            [instruction for _, instruction in batch],
            text_tokens=config.text_tokens,
            batch_size=config.batch_size,
        )
        noise = draw_noise(compiled.noise_shape, 0)
        found = compiled.outputs(
            inputs.image, inputs.input_ids, inputs.text_length, noise, stages=("cognition", "samples")
        )
        arrays = (inputs.image, inputs.input_ids, inputs.text_length, noise)
        image, ids, length, start = (torch.from_numpy(array).to(device) for array in arrays)
        with torch.no_grad():
            cognition = policy.cognition(image, ids, length)
        samples = policy.denoise(cognition, start, ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale)
        dense = {"cognition": cognition.float().cpu().numpy(), "samples": samples.cpu().numpy()}
        for stages in (dense, found):
            stages["actions"] = np.clip(stages["samples"], -1.0, 1.0)
        worst = {stage: max(error, relative_error(found[stage], dense[stage])) for stage, error in worst.items()}
    return tuple(StageDeviation(stage=stage, relative=error, frames=len(frames)) for stage, error in worst.items())
