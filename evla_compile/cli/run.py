"""`evla run` and its output."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table

import evla_compile as evla
from evla_compile.cli.arguments import Artifact, read_path
from evla_compile.cli.console import new_table, print_json
from evla_compile.cli.recording_options import Camera, Episodes, Every, selection_of
from evla_compile.cli.run_inputs import RecordedFrame, check_actions_file, list_observations, read_noise
from evla_compile.host.camera_frame import Framing
from evla_compile.host.frames import FrameFile
from evla_compile.runtime import Provider
from evla_compile.scratch import replacing
from evla_compile.terminal import in_one_line, new_console

if TYPE_CHECKING:
    from evla_compile.runtime.latency import LatencySummary


ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
"""The numbers of an action."""


def run(
    artifact: Artifact,
    image: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="FILE|DIR", help="Camera frame, 8-bit RGB, or a folder of them."),
    ] = None,
    instruction: Annotated[
        str | None, typer.Option(help="The task in words, with --image or a recording; a bag needs it.")
    ] = None,
    frames: Annotated[
        Path | None,
        typer.Option(
            parser=read_path, metavar="FRAMES", help="Frames: folder with frames.jsonl, LeRobotDataset, MCAP bag."
        ),
    ] = None,
    camera: Camera = None,
    every: Every = 1,
    episodes: Episodes = None,
    convert: Annotated[
        bool, typer.Option("--convert", help="Take greyscale, palette and opaque RGBA images as RGB.")
    ] = False,
    unnorm_key: Annotated[str | None, typer.Option(help="Dataset whose statistics scale the actions.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler's noise, the same for every frame.")] = None,
    noise: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="NPY", help="Noise instead: float [A,7], or [N,A,7] for N frames."),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="NPY", help="Write the actions there: float64 [N,A,7]."),
    ] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="Where to compute; engine for an .engine file, else cpu by default.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads within an operator on the CPU.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls of each frame; more than one prints their latency.")] = 1,
    cuda_graph: Annotated[bool, typer.Option("--cuda-graph", help="Launch an engine's calls as a CUDA graph.")] = (
        False
    ),
    cache: Annotated[
        Path | None,
        typer.Option(parser=read_path, metavar="DIR", help="Keep engines or kernels that are built at load time."),
    ] = None,
    mapped: Annotated[bool, typer.Option("--mapped", help="Leave the weights in their file: slower, less memory.")] = (
        False
    ),
    allow_cpu: Annotated[
        bool, typer.Option("--allow-cpu", help="Let operators that the provider lacks run on the CPU.")
    ] = False,
    framing: Annotated[
        Framing,
        typer.Option(help="What the policy sees of a frame: all, or a crop as in CogACT's server for robots."),
    ] = "whole",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict action chunks for camera frames on ONNX Runtime or TensorRT; imports no torch."""
    selection = selection_of(camera, every, episodes, instruction)
    files = list_observations(image, frames, selection, convert=convert)
    starts = [None] * len(files) if noise is None else read_noise(noise, len(files))
    check_actions_file(out)
    first = files[0].read(convert=convert)  # before the policy is loaded, which takes longer
    policy = evla.runtime.load(
        artifact, provider, threads, mapped=mapped, cuda_graph=cuda_graph, cache=cache, allow_cpu=allow_cpu
    )
    _refuse_batches(policy.config.batch_size)
    chunks = []
    for number, (file, start) in enumerate(zip(files, starts, strict=True)):
        frame = first if number == 0 else file.read(convert=convert)
        for _ in range(repeat):
            actions = policy.predict_action(*frame, unnorm_key, noise=start, seed=seed, framing=framing)
        chunks.append(actions)
    if out is not None:
        with replacing(out) as place:
            np.save(place, np.stack(chunks))
    latency = policy.latency.summary() if repeat > 1 else ()
    single = image is not None and not image.is_dir()
    if as_json:
        shown = {"names": ACTION_NAMES, **_as_json(files, chunks, single=single)}
        print_json(shown | ({"latency": [asdict(summary) for summary in latency]} if latency else {}))
        return
    if out is not None:
        new_console().print(f"wrote {out}: actions {list(np.stack(chunks).shape)}, a chunk a frame", soft_wrap=True)
    else:
        _print_actions(files, chunks, single=single)
    if latency:
        new_console().print(call_table(latency))


def _refuse_batches(batch_size: int) -> None:
    if batch_size > 1:
        raise ValueError(
            f"evla run gives one frame, and this policy takes {batch_size} at a time: compile it with --batch-size 1,"
            f" or in Python call evla_compile.runtime.load(...).predict_action with {batch_size} frames and"
            " instructions"
        )


def _print_actions(
    files: Sequence[FrameFile | RecordedFrame], chunks: Sequence[NDArray[np.float64]], *, single: bool
) -> None:
    for file, actions in zip(files, chunks, strict=True):
        where = "" if single else f" on {in_one_line(str(file.image))}"
        new_console().print(action_table(actions, f'Actions for "{in_one_line(file.instruction)}"{where}'))


def _as_json(
    files: Sequence[FrameFile | RecordedFrame], chunks: Sequence[NDArray[np.float64]], *, single: bool
) -> dict[str, Any]:
    if single:
        return {"actions": chunks[0].tolist()}
    found = zip(files, chunks, strict=True)
    return {
        "frames": [
            {"image": str(file.image), "instruction": file.instruction, "actions": actions.tolist()}
            for file, actions in found
        ]
    }


def action_table(actions: NDArray[np.float64], title: str) -> Table:
    """Return an action chunk [A,7], a step a row."""
    table = new_table(title, right=("step", *ACTION_NAMES))
    for step, action in enumerate(actions):
        table.add_row(str(step), *(f"{number:.4f}" for number in action[:-1]), f"{action[-1]:g}")
    return table


def call_table(latency: Sequence["LatencySummary"]) -> RenderableType:
    """Return the latencies of a loaded policy's calls, and what they include."""
    table = new_table("Latency, ms", "time", right=("calls", "median", "p95", "p99", "first call"))
    for summary in latency:
        times = (f"{value:.2f}" for value in (summary.median, summary.p95, summary.p99, summary.first))
        table.add_row(summary.kind, str(summary.count), *times)
    notes = [f"{summary.kind}: {summary.includes}." for summary in latency]
    return Group(table, *notes, "The first call, which includes warming up, is not part of the other figures.")
