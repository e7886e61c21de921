"""`evla compile` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import evla_compile as evla
from evla_compile.artifact.files import check_target
from evla_compile.cli.arguments import RunDirectory, read_path
from evla_compile.cli.console import new_table, step
from evla_compile.cli.next_steps import print_next
from evla_compile.cli.recording_options import (
    Camera,
    Episodes,
    Every,
    Task,
    read_source,
    refuse_selection,
    selection_of,
)
from evla_compile.cli.setting_options import Dense, Preset, Settings, with_settings
from evla_compile.cli.settings import read_config, read_plan
from evla_compile.host.camera_frame import Framing
from evla_compile.memory import PeakMemory, watching_memory
from evla_compile.settings.config import OPSET
from evla_compile.settings.plan import check_plan, plan_without_calibration
from evla_compile.settings.precision import Precision
from evla_compile.terminal import new_console
from evla_compile.units import bytes_text

if TYPE_CHECKING:
    from evla_compile.compiler.report import CompileReport


STAGES = ("cognition", "samples", "actions")
"""The stages whose deviations are reported, in data-flow order."""


@with_settings
def compile_policy(
    run_dir: RunDirectory,
    out: Annotated[Path, typer.Option(parser=read_path, metavar="DIR", help="Folder for the artifact, or an X.onnx.")],
    calibration: Annotated[
        Path | None,
        typer.Option(
            parser=read_path,
            metavar="FRAMES",
            help="Real observations: folder with frames.jsonl, LeRobotDataset, MCAP bag.",
        ),
    ] = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Take greyscale, palette and opaque RGBA frames as RGB.")
    ] = False,
    camera: Camera = None,
    every: Every = 1,
    episodes: Episodes = None,
    instruction: Task = None,
    scratch: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="DIR", help="Folder from which an interrupted calibration goes on."),
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(
            parser=read_path, metavar="PLAN", help="Plan file, or DIR of a compiled policy: do not measure again."
        ),
    ] = None,
    preset: Preset = None,
    dense: Dense = False,
    *,
    settings: Settings,
    tokenizer: Annotated[
        Path | None, typer.Option(parser=read_path, metavar="FILE|DIR", help="Llama-2's tokenizer.json, or its folder.")
    ] = None,
    use_ema: Annotated[
        bool, typer.Option("--use-ema", help="Take the moving average of the action head from the checkpoint.")
    ] = False,
    precision: Annotated[
        Precision, typer.Option(help="Of weights and matrix products outside the action head.")
    ] = "float32",
    parts: Annotated[int, typer.Option(min=1, help="Graphs to split it into: 2 are perception and action.")] = 1,
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = OPSET,
    framing: Annotated[Framing, typer.Option(help="How calibration crops a frame: give evla run the same.")] = "whole",
    check: Annotated[bool, typer.Option("--verify/--no-verify", help="Verify the artifact at the end.")] = True,
) -> None:
    """Compile a policy to an artifact: with the budgets of the paper's headline row, unless options say otherwise."""
    config = read_config(settings, preset=preset, dense=dense)
    check_target(out)
    _refuse_framing_alone(framing, calibration)
    selection = selection_of(camera, every, episodes, instruction)
    if calibration is None:
        refuse_selection(selection, "--calibration is not given")
    chosen = None if plan is None else read_plan(plan)
    with step("import torch"):
        from evla_compile.families.cogact.loading.checkpoint import read_checkpoint
    # Check what shapes alone can show first: loading reads gigabytes, and importing the compiler takes seconds.
    sizes = read_checkpoint(run_dir, use_ema=use_ema).sizes
    config = config.resolve(sizes)
    if chosen is None and calibration is None:
        chosen = plan_without_calibration(sizes, config)
    with step("import the compiler and its exporters"):
        from evla_compile.exporters.split import check_parts
        from evla_compile.exporters.to_onnx import OPSETS
    if opset not in OPSETS:
        raise ValueError(f"--opset {opset}: expected one from {OPSETS.start} to {OPSETS.stop - 1}")
    frames = None if calibration is None else read_source(calibration, selection, convert=convert)
    if chosen is not None:
        check_plan(chosen, config, sizes)
    check_parts(parts, config.kept_layer_count(sizes) if chosen is None else len(chosen.keep_layers))
    with watching_memory() as peak:
        with step("load the policy"):
            policy = evla.load(run_dir, tokenizer=tokenizer, use_ema=use_ema, deferred=True)
        for frame in frames or ():
            policy.processor.text(frame.instruction, config.text_tokens)
        if frames is not None and framing != "whole":  # later steps do not change an image of the policy's size
            frames = [evla.Frame(policy.processor.image(f.image, framing), f.instruction, f.episode) for f in frames]
        with step("capture and rewrite the graph", spinner=chosen is not None):  # calibration draws its own bar
            compiled = evla.compile(policy, config, calibration=frames, plan=chosen, scratch=scratch)
        with step(f"export it to {out}", spinner=False):  # it draws its own progress bar
            compiled.export(out, opset=opset, precision=precision, parts=parts)
    _print_memory(peak)
    if check:
        with step("verify it on ONNX Runtime"):
            evla.verify(out, provider="cpu")
    new_console().print(compile_summary(compiled.report))
    print_next(out, policy.processor.statistics, batch_size=config.batch_size, framing=framing, precision=precision)


def _refuse_framing_alone(framing: Framing, calibration: Path | None) -> None:
    if framing != "whole" and calibration is None:
        raise ValueError(
            f"--framing {framing} is for the frames of --calibration, and none are given: give them too, or leave it"
            " out and give it to evla run"
        )


def _print_memory(peak: PeakMemory) -> None:
    if peak.private:
        new_console(stderr=True).print(
            f"peak memory {bytes_text(peak.private)}, and {bytes_text(peak.resident)} together with the files mapped",
            style="dim",
            soft_wrap=True,
        )


def compile_summary(report: "CompileReport") -> RenderableType:
    """Return the report of a compilation as tables."""
    lines = map(Text, [*report.fidelity_lines(), *report.repair_lines()])
    if not report.deviations:
        advice = "Deviation from the dense policy: not measured. --calibration FRAMES measures it, beside --plan too."
        return Group("", pass_table(report), advice, *lines)
    deviations = deviation_table([("from the dense policy", deviations_by_stage(report))])
    return Group("", pass_table(report), deviations, *lines)


def pass_table(report: "CompileReport") -> Table:
    """Return the table of passes."""
    header, *rows = report.rows()
    table = new_table("What the passes did", *header[:2], right=header[2:])
    for row in rows:
        table.add_row(*row)
    return table


def deviation_table(rows: Sequence[tuple[str, Mapping[str, float]]]) -> Table:
    """Return relative errors by what is compared and by stage; a dash where a stage was not compared."""
    table = new_table("Largest difference over the largest value", "compared", right=STAGES)
    for name, errors in rows:
        table.add_row(name, *(f"{errors[stage]:.1e}" if stage in errors else "-" for stage in STAGES))
    return table


def deviations_by_stage(report: "CompileReport") -> dict[str, float]:
    """Return the relative error of every stage that was measured."""
    return {deviation.stage: deviation.relative for deviation in report.deviations}
