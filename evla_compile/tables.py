"""What the command line shows, as rich renderables; prints nothing and imports no torch."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evla_compile.config import DDIM_STEPS
from evla_compile.devices import DEVICES
from evla_compile.engine_settings import FLAVOUR_NAMES
from evla_compile.manifest import EngineRecord, Manifest
from evla_compile.picture import kept_tokens_text

if TYPE_CHECKING:
    from torch import Tensor

    from evla_compile.checkpoint import Checkpoint
    from evla_compile.demo import DemoResult, Latency
    from evla_compile.doctor import Survey
    from evla_compile.doctor_request import Finding
    from evla_compile.estimate import Estimate
    from evla_compile.report import CompileReport
    from evla_compile.runtime.latency import LatencySummary
    from evla_compile.verification import Verification

ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
"""The numbers of an action."""
STAGES = ("cognition", "samples", "actions")
"""The stages of which deviations are reported, in data-flow order."""


def compile_summary(report: "CompileReport") -> RenderableType:
    """Return what a compilation did."""
    if not report.deviations:
        return Group("", pass_table(report), "Deviation from the dense policy: not measured, no frames were given.")
    return Group("", pass_table(report), deviation_table([("from the dense policy", _deviations(report))]))


def demo_summary(result: "DemoResult") -> RenderableType:
    """Return what the demo found."""
    deviations, sizes = [], {}
    for variant in result.variants:
        deviations.append((f"{variant.name} graph, from the dense policy", _deviations(variant.report)))
        deviations.append((f"{variant.name} ONNX, from its graph", dict(variant.verification.errors)))
        sizes[f"{variant.name} ONNX"] = variant.onnx_bytes
    return Group(
        "",
        pass_table(result.variants[-1].report),
        deviation_table(deviations),
        "Every figure is of the worst frame. The lossy passes do move actions, those of single frames far;"
        " how often the policy then still solves its tasks is measured in simulation: docs/quality.md.\n",
        latency_table(result.latencies, sizes),
        f"{result.conditions}\n",
        action_table(result.actions, f'Actions of the compiled ONNX for "{result.instruction}"'),
        f"Visual tokens kept of this frame, {len(result.kept_tokens)} of {result.patches}:",
        Text(kept_tokens_text(result.kept_tokens, result.patches)),
    )


def pass_table(report: "CompileReport") -> Table:
    """Return what every pass did."""
    table = _table("What the passes did", "pass", "kind", right=("changes", "ops", "GFLOP", "weights MB"))
    for row in report.rows():
        table.add_row(*row)
    return table


def deviation_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Table:
    """Return relative errors by what is compared and by stage; a dash where a stage was not compared."""
    table = _table("Largest difference over the largest value", "compared", right=STAGES)
    for name, errors in rows:
        table.add_row(name, *(f"{errors[stage]:.1e}" if stage in errors else "-" for stage in STAGES))
    return table


def latency_table(latencies: "Sequence[Latency]", onnx_bytes: Mapping[str, int]) -> Table:
    """Return the latencies, each with its ratio to the first, and the sizes of the ONNX files by backend."""
    table = _table("Latency", "backend", right=("median ms", "p95 ms", "speed-up", "ONNX file MB"))
    for latency in latencies:
        size = f"{onnx_bytes[latency.name] / 1e6:.1f}" if latency.name in onnx_bytes else "-"
        ratio = f"{latencies[0].median / latency.median:.2f}x"
        table.add_row(latency.name, f"{latency.median:.1f}", f"{latency.p95:.1f}", ratio, size)
    return table


def action_table(actions: NDArray[np.float64], title: str) -> Table:
    """Return an action chunk [A,7], a step a row."""
    table = _table(title, right=("step", *ACTION_NAMES))
    for step, action in enumerate(actions):
        table.add_row(str(step), *(f"{number:.4f}" for number in action[:-1]), f"{action[-1]:g}")
    return table


def checkpoint_summary(checkpoint: "Checkpoint") -> RenderableType:
    """Return what a run directory holds."""
    side, found = checkpoint.sizes.image_side, (checkpoint.run / "tokenizer.json").is_file()
    return Group(
        checkpoint_table(checkpoint),
        f"frame: {side} x {side} pixels",
        f"datasets: {', '.join(sorted(checkpoint.statistics))}",
        f"tokenizer: {'tokenizer.json in the run directory' if found else 'none here; give --tokenizer'}\n",
    )


def checkpoint_table(checkpoint: "Checkpoint") -> Table:
    """Return the modules of a checkpoint with their sizes, parameters and stored dtypes."""
    sizes = checkpoint.sizes
    language, action = sizes.language, sizes.action
    towers = {
        f"vision_backbone.{name}_featurizer": f"{tower.depth} blocks of {tower.width}, {tower.heads} heads, MLP"
        f" {tower.mlp_width}, {tower.patches} patches"
        for name, tower in (("dino", sizes.dino), ("siglip", sizes.siglip))
    }
    modules = {
        **towers,
        "projector": " -> ".join(map(str, sizes.projector)),
        "llm_backbone": f"{language.layers} layers of {language.width}, {language.heads} heads ({language.kv_heads} of"
        f" keys), MLP {language.mlp_width}, vocabulary {language.vocabulary}",
        "action_model": f"{action.depth} blocks of {action.width}, {action.heads} heads, MLP {action.mlp_width}, chunk"
        f" {action.chunk} x {action.action_width}",
    }
    table = _table(None, "module", "sizes", right=("parameters", "dtype", "GB"))
    table.columns[0].no_wrap = True
    for module, description in modules.items():
        tensors = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(f"{module}.")]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        table.add_row(module, description, *_stored(tensors, ", ".join(dtypes)))
    table.add_section()
    table.add_row("total", "", *_stored(checkpoint.tensors.values(), ""))
    return table


def estimate_summary(estimates: "Mapping[str, Estimate]", *, text_tokens: int) -> RenderableType:
    """Return what policies hold and compute, as a whole and by part, and how fast devices could run them at best.

    Args:
        estimates: estimates by name, in one dtype; the one that the others are compared with is named `upstream`.
        text_tokens: text budget that they were counted with.
    """
    dtype = estimates["upstream"].dtype
    return Group(
        estimate_table(estimates),
        part_table(estimates),
        roofline_table(estimates),
        f"One action chunk at batch 1, {text_tokens} text tokens, {DDIM_STEPS} denoising steps; vision and language in"
        f" {dtype}, the action head in float32.\n"
        "GFLOP counts all that is executed; GFLOP (paper) as EfficientVLA printed it: linear layers, convolutions and"
        " layer norms, no attention products. The last column is its share of upstream's.\n"
        "The roofline is a lower bound of a call's time: every weight read once, activations free, all at the"
        " datasheet's peak. A dash: the weights alone exceed the memory.",
    )


def estimate_table(estimates: "Mapping[str, Estimate]") -> Table:
    """Return what each policy holds and computes, and its share of the operations of the one named `upstream`."""
    table = _table(
        "Size and operations",
        "policy",
        right=("parameters", "weights GB", "GFLOP", "GFLOP (paper)", "% of upstream"),
    )
    upstream = estimates["upstream"].total.paper_flops
    for name, estimate in estimates.items():
        total = estimate.total
        numbers = (
            f"{total.flops / 1e9:,.1f}",
            f"{total.paper_flops / 1e9:,.1f}",
            f"{total.paper_flops / upstream:.1%}",
        )
        table.add_row(name, f"{total.parameters:,}", f"{total.weight_bytes / 1e9:.2f}", *numbers)
    return table


def part_table(estimates: "Mapping[str, Estimate]") -> Table:
    """Return what each part of each policy holds and computes."""
    columns = (f"{part}\n{unit}" for unit in ("GFLOP", "GB") for part in ("vision", "language", "action"))
    table = _table("By module", "policy", right=tuple(columns))
    for name, estimate in estimates.items():
        held = estimate.parts.values()
        flops, weights = (
            (f"{part.flops / 1e9:,.1f}" for part in held),
            (f"{part.weight_bytes / 1e9:.2f}" for part in held),
        )
        table.add_row(name, *flops, *weights)
    return table


def roofline_table(estimates: "Mapping[str, Estimate]") -> Table:
    """Return a lower bound of a call's time on every named device; a dash where the weights exceed its memory."""
    table = _table("Roofline, ms", "device", right=("GB", *estimates))
    table.columns[0].no_wrap = True
    for device in DEVICES.values():
        bounds = (f"{e.roofline_seconds(device) * 1e3:.1f}" if e.fits(device) else "-" for e in estimates.values())
        table.add_row(device.name, f"{device.memory_bytes / 1e9:.0f}", *bounds)
    return table


def manifest_table(manifest: Manifest) -> Table:
    """Return what an artifact says of itself."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("made by", f"evla_compile {manifest.created_by}, ONNX opset {manifest.opset}")
    for name, value in manifest.config.to_json().items():
        table.add_row(name, "all" if value is None else str(value))
    for kind, specs in (("input", manifest.inputs), ("output", manifest.outputs)):
        for spec in specs:
            table.add_row(kind, str(spec))
    table.add_row("datasets", ", ".join(sorted(manifest.statistics)))
    table.add_row("layers kept", ", ".join(map(str, manifest.plan.keep_layers)))
    table.add_row("calibrated on", f"{manifest.plan.frames} frames")
    if manifest.precision != "float32":
        table.add_row("precision", manifest.precision)
    if manifest.engine is not None:
        table.add_row("engine", describe_engine(manifest.engine))
    for record in manifest.files:
        table.add_row("file", f"{record.name}, {record.size:,} bytes, SHA-256 {record.sha256[:12]}...")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    return table


def call_table(latency: Sequence["LatencySummary"]) -> RenderableType:
    """Return how long calls of a loaded policy took, and what the times hold."""
    table = _table("Latency, ms", "time", right=("calls", "median", "p95", "p99", "first call"))
    for summary in latency:
        times = (f"{value:.2f}" for value in (summary.median, summary.p95, summary.p99, summary.first))
        table.add_row(summary.kind, str(summary.count), *times)
    notes = [f"{summary.kind}: {summary.includes}." for summary in latency]
    return Group(table, *notes, "The first call, which warms everything up, is in none of the other figures.")


def findings_table(findings: Iterable["Finding"]) -> Table:
    """Return what the doctor found."""
    table = _table(None, "check", "", "found")
    table.columns[0].no_wrap = True
    for finding in findings:
        table.add_row(finding.check, finding.status, finding.found)
    return table


def remedies(findings: Iterable["Finding"]) -> tuple[str, ...]:
    """Return what to do about what the doctor found, a line each: commands in them are there to be copied whole."""
    checks: dict[str, list[str]] = {}
    for finding in findings:
        if finding.remedy is not None:
            checks.setdefault(finding.remedy, []).append(finding.check)
    return tuple(f"{', '.join(names)}: {remedy}" for remedy, names in checks.items())


def works_table(found: "Survey") -> Table:
    """Return what can be done on a machine, and what stands in the way of the rest."""
    table = _table(None, "evla doctor ...", "", "what stands in the way")
    table.columns[0].no_wrap = True
    for request, lacks in found.lacks:
        table.add_row(request.arguments(), "cannot" if lacks else "can", ", ".join(lacks))
    return table


def stage_table(found: "Verification") -> Table:
    """Return how far every stage of an artifact is from the float32 torch graph."""
    table = _table("Against float32 torch", "stage", right=("relative error",))
    for name, error in found.stages:
        table.add_row(name, f"{error:.1e}")
    return table


def describe_engine(engine: EngineRecord) -> str:
    """Return in a line what an artifact's engines run on."""
    made_on = engine.gpu or engine.platform
    targets = ", ".join(engine.compute_capabilities) or "8.0, 8.6, 8.9 and 12.x"
    layers = " + ".join(f"{count:,}" for count in engine.layers)
    return f"{FLAVOUR_NAMES[engine.flavour]} {engine.version}, compute capability {targets}, {layers} layers, {made_on}"


def _deviations(report: "CompileReport") -> dict[str, float]:
    return {deviation.stage: deviation.relative for deviation in report.deviations}


def _stored(tensors: "Iterable[Tensor]", dtypes: str) -> tuple[str, str, str]:
    tensors = list(tensors)
    return f"{sum(t.numel() for t in tensors):,}", dtypes, f"{sum(t.nbytes for t in tensors) / 1e9:.2f}"


def _table(title: str | None, *left: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
