"""`evla demo` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from evla_compile.cli.arguments import read_path
from evla_compile.cli.compile import deviation_table, deviations_by_stage, pass_table
from evla_compile.cli.console import new_table, step
from evla_compile.cli.next_steps import print_next
from evla_compile.cli.run import action_table
from evla_compile.host.picture import kept_tokens_text
from evla_compile.scratch import new_folder, remove_stale, scratch
from evla_compile.terminal import new_console
from evla_compile.units import byte_scale, time_scale

if TYPE_CHECKING:
    from evla_compile.demo.demo import DemoResult, Latency


def demo(
    out: Annotated[
        Path | None, typer.Option(parser=read_path, metavar="DIR", help="New folder to keep everything in.")
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Timed calls of each backend.")] = 20,
    threads: Annotated[int, typer.Option(min=1, help="Threads of each backend.")] = 1,
) -> None:
    """Compile, export, verify and run the small policy that the package contains, and time it. Needs no network."""
    if out is not None and (out.exists() or not out.parent.is_dir()):
        raise ValueError(f"--out {out}: expected a folder that does not exist yet, in one that does; choose another")
    if out is not None:
        remove_stale(out)
    with TemporaryDirectory() if out is None else scratch(out) as place:
        folder = new_folder(Path(place))
        with step("import torch and transformers"):
            from evla_compile.demo.demo import PICTURE, run_demo
            from evla_compile.demo.shipped_policy import DEMO_IMAGE
        result = run_demo(folder, runs=runs, threads=threads, step=step)
        if out is not None:
            folder.rename(out)
    new_console().print(demo_summary(result))
    if out is not None:
        new_console().print(f"the same on the frame: {out / PICTURE}")
        print_next(out / "compiled", (), image=DEMO_IMAGE, instruction=result.instruction)


def demo_summary(result: "DemoResult") -> RenderableType:
    """Return the demo's results as tables."""
    deviations, sizes, report = [], {}, result.variants[-1].report
    for variant in result.variants:
        deviations.append((f"{variant.name} graph, from the dense policy", deviations_by_stage(variant.report)))
        deviations.append((f"{variant.name} ONNX, from its graph", dict(variant.verification.errors)))
        sizes[f"{variant.name} ONNX"] = variant.onnx_bytes
    return Group(
        "",
        pass_table(report),
        *(Text(f"{line}\n") for line in (*report.repair_lines(), *report.fidelity_lines())),
        deviation_table(deviations),
        "Every figure of this table is of the worst of two frames. How often the policy still solves its tasks is"
        " measured in simulation: docs/results/quality.md.\n",
        latency_table(result.latencies, sizes),
        f"{result.conditions}\n",
        action_table(result.actions, f'Actions of the compiled ONNX for "{result.instruction}"'),
        f"Visual tokens kept of this frame, {len(result.kept_tokens)} of {result.patches} (## kept, .. dropped):",
        Text(kept_tokens_text(result.kept_tokens, result.patches)),
    )


def latency_table(latencies: "Sequence[Latency]", onnx_bytes: Mapping[str, int]) -> Table:
    """Return the latencies, each with its ratio to the first, and the sizes of the ONNX files by backend."""
    times = time_scale(1e-3 * latency.median for latency in latencies)
    sizes = byte_scale(onnx_bytes.values())
    columns = (f"median {times.unit}", f"p95 {times.unit}", "speed-up", f"ONNX file {sizes.unit}")
    table = new_table("Latency", "backend", right=columns)
    for latency in latencies:
        size = sizes.show(onnx_bytes[latency.name]) if latency.name in onnx_bytes else "-"
        ratio = f"{latencies[0].median / latency.median:.2f}x"
        table.add_row(latency.name, times.show(1e-3 * latency.median), times.show(1e-3 * latency.p95), ratio, size)
    return table
