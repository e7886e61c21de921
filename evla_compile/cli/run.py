"""`evla run`, and what it shows."""

# ruff: noqa: PLC0415 - torch takes seconds to import, so a command imports what it needs.

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Group, RenderableType
from rich.table import Table

import evla_compile as evla
from evla_compile.camera_frame import Framing
from evla_compile.cli.arguments import Artifact, read_path
from evla_compile.cli.console import new_table, print_json
from evla_compile.runtime import Provider
from evla_compile.terminal import in_one_line, new_console

if TYPE_CHECKING:
    from evla_compile.runtime.latency import LatencySummary


ACTION_NAMES = ("dx", "dy", "dz", "droll", "dpitch", "dyaw", "gripper")
"""The numbers of an action."""


def run(
    artifact: Artifact,
    image: Annotated[Path, typer.Option(parser=read_path, metavar="FILE", help="Camera frame, 8-bit RGB.")],
    instruction: Annotated[str, typer.Option(help="What the robot shall do.")],
    unnorm_key: Annotated[str | None, typer.Option(help="Dataset whose statistics scale the actions.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the sampler's noise.")] = None,
    provider: Annotated[
        Provider | None, typer.Option(help="Where to compute; engine for an .engine file, else cpu by default.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Calls, timed; more than one prints their latency.")] = 1,
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
        typer.Option(help="What the policy sees of a frame: all, or a cut as CogACT's server for robots has it."),
    ] = "whole",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict the action chunk for a camera frame on ONNX Runtime or TensorRT; imports no torch."""
    from evla_compile.host import read_image

    frame = read_image(image)
    policy = evla.runtime.load(
        artifact, provider, mapped=mapped, cuda_graph=cuda_graph, cache=cache, allow_cpu=allow_cpu
    )
    batch = policy.config.batch_size
    if batch > 1:
        raise ValueError(
            f"evla run gives one frame, and this policy takes {batch} at a time: compile it with --batch-size 1, or in"
            f" Python call evla_compile.runtime.load(...).predict_action with {batch} frames and instructions"
        )
    for _ in range(repeat):
        actions = policy.predict_action(frame, instruction, unnorm_key, seed=seed, framing=framing)
    latency = policy.latency.summary() if repeat > 1 else ()
    if as_json:
        found = {"names": ACTION_NAMES, "actions": actions.tolist()}
        print_json(found | ({"latency": [asdict(summary) for summary in latency]} if latency else {}))
        return
    new_console().print(action_table(actions, f'Actions for "{in_one_line(instruction)}"'))
    if latency:
        new_console().print(call_table(latency))


def action_table(actions: NDArray[np.float64], title: str) -> Table:
    """Return an action chunk [A,7], a step a row."""
    table = new_table(title, right=("step", *ACTION_NAMES))
    for step, action in enumerate(actions):
        table.add_row(str(step), *(f"{number:.4f}" for number in action[:-1]), f"{action[-1]:g}")
    return table


def call_table(latency: Sequence["LatencySummary"]) -> RenderableType:
    """Return how long calls of a loaded policy took, and what the times hold."""
    table = new_table("Latency, ms", "time", right=("calls", "median", "p95", "p99", "first call"))
    for summary in latency:
        times = (f"{value:.2f}" for value in (summary.median, summary.p95, summary.p99, summary.first))
        table.add_row(summary.kind, str(summary.count), *times)
    notes = [f"{summary.kind}: {summary.includes}." for summary in latency]
    return Group(table, *notes, "The first call, which warms everything up, is in none of the other figures.")
