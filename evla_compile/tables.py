"""What the command line shows, as rich renderables; prints nothing and imports no torch."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from evla_compile.manifest import Manifest

if TYPE_CHECKING:
    from evla_compile.checkpoint import Checkpoint
    from evla_compile.demo import DemoResult, Latency
    from evla_compile.report import CompileReport

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
        latency_table(result.latencies, sizes),
        f"{result.conditions}\n",
        action_table(result.actions, f'Actions of the compiled ONNX for "{result.instruction}"'),
        "The weights of this policy are random: its actions, and how far the compiled ones are from the dense ones, say"
        " nothing about a robot's success. Operators, sizes, latencies and the agreement of each ONNX with its graph"
        " are real.",
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
    table = _table(None, "module", "sizes", right=("parameters", "dtype"))
    table.columns[0].no_wrap = True
    for module, description in modules.items():
        tensors = [tensor for name, tensor in checkpoint.tensors.items() if name.startswith(f"{module}.")]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        table.add_row(module, description, f"{sum(t.numel() for t in tensors):,}", ", ".join(dtypes))
    table.add_section()
    everything = checkpoint.tensors.values()
    table.add_row("total", "", f"{sum(t.numel() for t in everything):,}", "")
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
    for record in manifest.files:
        table.add_row("file", f"{record.name}, {record.size:,} bytes, SHA-256 {record.sha256[:12]}...")
    table.add_row("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items()))
    return table


def _deviations(report: "CompileReport") -> dict[str, float]:
    return {deviation.stage: deviation.relative for deviation in report.deviations}


def _table(title: str | None, *left: str, right: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in left:
        table.add_column(name, overflow="fold")
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table
