"""`evla fidelity` and its output."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

import evla_compile as evla
from evla_compile.cli.arguments import read_path
from evla_compile.cli.console import new_table, print_json, step
from evla_compile.cli.recording_options import Camera, Episodes, Every, Task, read_source, selection_of
from evla_compile.fidelity.chunks import DRAWS, SUFFIX, ActionChunks
from evla_compile.fidelity.measure import HORIZON, Deviation, Fidelity
from evla_compile.host.camera_frame import Framing
from evla_compile.runtime import Provider
from evla_compile.terminal import in_one_line, new_console

MOST_ROWS = 10
"""Instructions and episodes that are shown, the farthest ones."""
ABOVE = 1
"""Exit status where the drift is above --max."""


def fidelity(
    policy: Annotated[
        Path,
        typer.Argument(
            parser=read_path, metavar="A", help="Policy to judge: artifact, .onnx or .engine file, or a recorded .npz."
        ),
    ],
    reference: Annotated[
        Path | None,
        typer.Argument(
            parser=read_path, metavar="[B]", help="Against: dense policy's run directory, artifact, or recorded .npz."
        ),
    ] = None,
    *,
    frames: Annotated[
        Path,
        typer.Option(
            parser=read_path, metavar="FRAMES", help="Frames: folder with frames.jsonl, LeRobotDataset, MCAP bag."
        ),
    ],
    camera: Camera = None,
    every: Every = 1,
    episodes: Episodes = None,
    instruction: Task = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Take greyscale, palette and opaque RGBA images as RGB.")
    ] = False,
    framing: Annotated[
        Framing, typer.Option(help="What the policies see of a frame, as given to evla compile.")
    ] = "whole",
    draws: Annotated[int, typer.Option(min=1, help="Noises that each frame is run from.")] = DRAWS,
    horizon: Annotated[int, typer.Option(min=1, help="Actions of a chunk that the robot executes.")] = HORIZON,
    unnorm_key: Annotated[str | None, typer.Option(help="Dataset whose statistics scale the actions.")] = None,
    record: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="NPZ", help="Keep B's actions there, or A's where there is no B."),
    ] = None,
    largest: Annotated[
        float | None,
        typer.Option("--max", min=0.0, metavar="MM", help="Exit with status 1 if an instruction drifts farther."),
    ] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="Where artifacts compute; engine for an .engine file, else cpu by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads within an operator on the CPU.")] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="FILE|DIR", help="Llama-2's tokenizer.json, for a run directory."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure how far a policy's actions are from the dense policy's, at equal noise and on recorded frames."""
    if reference is None and record is None:
        raise ValueError("expected a second policy to compare with, or --record NPZ to keep the actions of this one")
    if record is not None and record.suffix != SUFFIX:
        raise ValueError(f"--record {record}: expected a file that ends in {SUFFIX}")
    if reference is None and (largest is not None or as_json):
        raise ValueError("--max and --json are for a comparison, and there is no second policy")
    observations = read_source(frames, selection_of(camera, every, episodes, instruction), convert=convert)
    options: dict[str, Any] = {"provider": provider, "threads": threads, "tokenizer": tokenizer}
    judged, against = _open(policy, **options), None if reference is None else _open(reference, **options)
    named = next((each for each in (judged, against) if not isinstance(each, ActionChunks | None)), None)
    if named is None:
        raise ValueError("both are recorded: give a policy for one, whose statistics scale the actions")
    if framing != "whole":
        processor = named.processor
        observations = [evla.Frame(processor.image(f.image, framing), f.instruction, f.episode) for f in observations]
    kept = judged if against is None else against
    if record is not None and not isinstance(kept, ActionChunks):
        kept = evla.record_chunks(kept, observations, draws=draws)
        kept.save(record)
        new_console(stderr=True).print(f"wrote {record}", style="dim", soft_wrap=True)
    if against is None:
        return
    with step(f"compare {len(observations)} frames from {draws} noises", spinner=False):
        found = evla.measure_fidelity(judged, kept, observations, draws=draws, horizon=horizon, unnorm_key=unnorm_key)
    if as_json:
        print_json(found.to_json())
    else:
        new_console().print(fidelity_tables(found))
    if largest is not None and found.drift > largest:
        new_console(stderr=True).print(f"a drift of {found.drift:.2f} mm is above --max {largest:g}", soft_wrap=True)
        raise typer.Exit(ABOVE)


def fidelity_tables(found: Fidelity) -> RenderableType:
    """Return a fidelity as tables, the headline last."""
    table = new_table(
        f"At equal noise, {found.frames} frames from {found.draws} noises, {found.horizon} actions",
        "distance",
        right=("mean", "95 %", "worst frame", "own noise"),
    )
    for name, unit, each in (
        ("end of the executed actions", "mm", found.end),
        ("each action", "mm", found.step),
        ("rotation at the end", "degrees", found.rotation),
    ):
        table.add_row(f"{name}, {unit}", *_figures(each))
    flips, own = (f"{share:.2%}" for share in (found.gripper_flips, found.own_gripper_flips))
    table.add_row("gripper flips", flips, "", "", own)
    dimensions = new_table("Each action dimension", "dimension", right=("mean", "95 %", "own noise"))
    for line in found.dimensions:
        dimensions.add_row(f"{line.name}, {line.unit}", *(f"{value:.3g}" for value in (line.mean, line.p95, line.own)))
    parts: list[RenderableType] = [table, dimensions, _instructions(found)]
    if found.episodes:
        parts.append(_episodes(found))
    return Group(*parts, found.line(), found.how_to_read())


def _figures(found: Deviation) -> tuple[str, str, str, str]:
    return f"{found.mean:.2f}", f"{found.p95:.2f}", f"{found.worst:.2f} ({found.frame})", f"{found.own:.2f}"


def _instructions(found: Fidelity) -> Table:
    shown = found.instructions[:MOST_ROWS]
    table = new_table(
        f"{len(shown)} of {len(found.instructions)} instructions, those that drift farthest",
        "instruction",
        right=("frames", "drift, mm", "chance, mm", "beyond own noise"),
    )
    for each in shown:
        figures = (str(each.frames), f"{each.drift:.2f}", f"{each.own:.2f}", f"{each.beyond_noise:.1%}")
        table.add_row(in_one_line(each.instruction), *figures)
    return table


def _episodes(found: Fidelity) -> Table:
    shown = found.episodes[:MOST_ROWS]
    table = new_table(
        f"Farthest {len(shown)} of {len(found.episodes)} episodes",
        "episode",
        right=("frames", "beyond own noise", "mean, mm"),
    )
    for each in shown:
        table.add_row(in_one_line(each.episode), str(each.frames), f"{each.beyond_noise:.0%}", f"{each.mean:.1f}")
    return table


def _open(path: Path, *, provider: Provider | None, threads: int | None, tokenizer: Path | None) -> Any:
    """Return recorded chunks, the dense policy of a run directory, or a loaded artifact."""
    if path.suffix == SUFFIX:
        return ActionChunks.load(path)
    if (path / "checkpoints").is_dir() or path.suffix == ".pt":
        with step(f"load the dense policy {path}"):
            from evla_compile.families.cogact.loading.checkpoint import load

            return load(path, tokenizer=tokenizer, deferred=True)
    with step(f"load {path}"):
        return evla.runtime.load(path, provider, threads)
