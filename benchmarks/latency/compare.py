"""Times CogACT as upstream runs it and as this package compiles it, row by row, on the backends asked for.

Weights are random, or those of a checkpoint. Which decoder layers and neurons a row keeps changes its actions and not
its time, so rows are compiled with stand-in plans: this script measures how fast a policy is, not how good.
Before anything is timed, every backend must return what the row's eager graph returns.
"""

import argparse
import platform
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from benchmarks.conditions import command_line
from benchmarks.latency.backends import BACKENDS, Backend, check_backends, draw_inputs
from benchmarks.latency.components import bound_seconds
from benchmarks.latency.policies import PolicyMaker
from benchmarks.latency.report import Entry, to_json, to_markdown
from benchmarks.latency.roofline_plot import draw_roofline
from benchmarks.latency.rows import SIZES, DtypeName, Row, make_rows, select_rows
from benchmarks.latency.timing import Latency, describe_clocks, describe_machine, find_roof, measure
from benchmarks.latency.variants import Variant, prepare_row
from evla_compile import __version__
from evla_compile.errors import EvlaError
from evla_compile.estimate.devices import Device
from evla_compile.families.cogact.loading.checkpoint import read_checkpoint
from evla_compile.settings.config import PAPER_TEXT_TOKENS
from evla_compile.settings.sizes import ModelSizes

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")
"""Modes of Inductor that leave CUDA graphs to the backends here."""
CHECKED_INPUTS = 2
"""Different inputs on which backends are compared: to notice a graph that always returns its recorded result."""

INCLUDES = (
    "one call, batch 1: the squashed uint8 frame, the token ids and the noise in host memory to the raw samples in host"
    " memory, copies to and from the device included; resizing, tokenizing and un-normalizing are not"
)
MODULES = (
    "medians within the same calls, between CUDA events on a GPU and by the clock on a CPU: vision is both towers and"
    " the projector, language the decoder with the selection of visual tokens, action the denoising loop; copies and"
    " host work are in none of them. For this every graph is cut into these three components, and each is compiled or"
    " recorded by itself; ONNX Runtime runs the whole graph, so its components are not timed"
)
PLAN = (
    "stand-in plans: the first layers and the first neurons are kept, without calibration; times do not depend on it,"
    " and the actions are meaningless"
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What to time, and how."""

    name: str
    """Name of the policy in titles and file names."""
    sizes: ModelSizes
    """Its sizes."""
    checkpoint: Mapping[str, Tensor] | None
    """Its official tensors; None for random weights."""
    device: torch.device
    """Where to compute."""
    dtype: DtypeName
    """Dtype of compiled rows, except the action head."""
    rows: tuple[Row, ...]
    """Rows to time."""
    backends: tuple[Backend, ...]
    """Backends to time them on; the policy as upstream runs it is always eager."""
    compile_mode: str
    """Inductor's mode."""
    warmup: int
    """Rounds that are not measured."""
    runs: int
    """Rounds that are measured."""
    threads: int
    """Threads of torch, and of ONNX Runtime on a CPU."""
    seed: int
    """Seed of weights and inputs."""
    out: Path
    """Folder of the results."""
    command: str
    """The command line."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the benchmark and write its files; an error that the package expects ends it with a line and status 1."""
    try:
        files = run(parse(sys.argv[1:] if arguments is None else arguments))
    except (EvlaError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(files[0].read_text(encoding="utf-8"))
    print(*(f"wrote {file}" for file in files), sep="\n")


def parse(arguments: Sequence[str]) -> Settings:
    """Read the command line.

    Raises:
        ValueError: a row is unknown, or a number out of range.
        EvlaError: the checkpoint cannot be read, or the device is not there.
    """
    given = _parser().parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        raise EvlaError("--device cuda: this torch sees no GPU; install a CUDA build of torch, or use --device cpu")
    if given.warmup < 0 or given.runs < 1 or given.threads < 1:
        raise ValueError("expected --warmup from 0 up, and --runs and --threads from 1 up")
    read = None if given.checkpoint is None else read_checkpoint(given.checkpoint)
    sizes = SIZES[given.size or "base"] if read is None else read.sizes
    on_cpu = given.device == "cpu"
    dtype: DtypeName = given.dtype or ("float32" if on_cpu else "bfloat16")
    backends: list[Backend] = given.backends or (["eager", "onnx-cpu"] if on_cpu else ["eager", "cudagraphs"])
    return Settings(
        name=(given.size or "base") if read is None else read.run.name,
        sizes=sizes,
        checkpoint=None if read is None else read.tensors,
        device=torch.device(given.device),
        dtype=dtype,
        rows=select_rows(make_rows(sizes, dtype=dtype, device=given.device), given.rows),
        backends=tuple(dict.fromkeys(backends)),
        compile_mode=given.compile_mode,
        warmup=given.warmup,
        runs=given.runs,
        threads=given.threads,
        seed=given.seed,
        out=given.out,
        command=command_line("benchmarks.latency", arguments),
    )


def run(settings: Settings) -> tuple[Path, ...]:
    """Time what the settings ask for; return the files written: the table, the numbers, the plot.

    Raises:
        EvlaError: a backend is not available here, or returns something else than the row's eager run.
        ValueError: a row's budgets do not fit the policy.
    """
    check_backends(settings.backends, settings.device, settings.dtype)
    settings.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(settings.threads)
    with _progress() as progress, TemporaryDirectory() as scratch:
        variants = prepare(settings, Path(scratch), progress)
        roof, clocks = find_roof(settings.device), describe_clocks(settings.device)
        task = progress.add_task("time all of them in turn", total=settings.warmup + settings.runs)
        inputs = draw_inputs(settings.sizes, settings.seed)
        latencies = measure(
            [partial(variant.sampler, inputs) for variant in variants],
            settings.device,
            warmup=settings.warmup,
            runs=settings.runs,
            step=lambda: progress.advance(task),
        )
    conditions = _conditions(settings) | {
        "clocks before and after": f"{clocks}; {describe_clocks(settings.device)}",
    }
    entries = [_entry(variant, latency, roof) for variant, latency in zip(variants, latencies, strict=True)]
    return write(entries, conditions, roof, settings)


def prepare(settings: Settings, scratch: Path, progress: Progress) -> list[Variant]:
    """Prepare every row on each of its backends, and compare it with the eager run of its row.

    Raises:
        EvlaError: a backend cannot run a row, or returns something else.
    """
    maker = PolicyMaker(settings.sizes, device=settings.device, seed=settings.seed, checkpoint=settings.checkpoint)
    inputs = [draw_inputs(settings.sizes, settings.seed + number) for number in range(CHECKED_INPUTS)]
    task = progress.add_task("", total=len(settings.rows))
    variants: list[Variant] = []
    for row in settings.rows:
        progress.update(task, description=f"make and check {row.label}")
        variants += prepare_row(
            row,
            maker,
            settings.backends,
            inputs,
            compile_mode=settings.compile_mode,
            threads=settings.threads,
            folder=scratch,
        )
        progress.advance(task)
    return variants


def write(
    entries: Sequence[Entry], conditions: Mapping[str, str], roof: Device, settings: Settings
) -> tuple[Path, ...]:
    """Write the table, the numbers and the plot, and return the three files."""
    stem = f"latency-{settings.name}-{settings.device.type}-{settings.dtype}"
    table, numbers, plot = (settings.out / f"{stem}.{suffix}" for suffix in ("md", "json", "png"))
    title = f"CogACT {settings.name}, {settings.dtype}, {conditions['processor']}"
    table.write_text(to_markdown(entries, conditions, roof, title), encoding="utf-8")
    numbers.write_text(to_json(entries, conditions, roof), encoding="utf-8")
    draw_roofline(entries, roof, settings.dtype, title, plot)
    return table, numbers, plot


def _entry(variant: Variant, latency: Latency, roof: Device) -> Entry:
    prepared = variant.prepared
    return Entry(
        row=prepared.row.label,
        backend=variant.backend,
        latency=latency,
        costs=prepared.costs,
        weight_bytes=prepared.weight_bytes,
        bound_seconds=bound_seconds(prepared.costs, roof, prepared.row.computes_in),
        peak_bytes=variant.peak_bytes,
        error=variant.error,
    )


def _conditions(settings: Settings) -> dict[str, str]:
    weights = "random" if settings.checkpoint is None else "the checkpoint's"
    onnx = [f"onnxruntime {import_module('onnxruntime').__version__}"] if "onnx" in " ".join(settings.backends) else []
    cuda = [f"CUDA {torch.version.cuda}"] if settings.device.type == "cuda" else []
    versions = [f"evla_compile {__version__}", f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    return {
        "command": f"`{settings.command}`",
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **describe_machine(settings.device),
        "versions": ", ".join([*versions, *cuda, *onnx]),
        "calls": f"{settings.runs} of each in turn, after {settings.warmup} rounds to warm up",
        "a call": INCLUDES,
        "modules": MODULES,
        "policies": f"{PAPER_TEXT_TOKENS} text tokens, {weights} weights, seed {settings.seed}; {PLAN}",
        "error": f"against the row's own eager run, on {CHECKED_INPUTS} inputs, before anything was timed",
    }


def _progress() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.latency", description=__doc__)
    policy = parser.add_mutually_exclusive_group()
    policy.add_argument("--size", choices=SIZES, help="policy with random weights (base)")
    policy.add_argument("--checkpoint", type=Path, help="run directory of a policy with trained weights")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=get_args(DtypeName), help="float32 on a CPU, bfloat16 on a GPU")
    parser.add_argument(
        "--rows", nargs="+", default=["upstream", "dense", "presets"], help="rows or groups: %(default)s"
    )
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="eager and onnx-cpu, or eager and cudagraphs")
    parser.add_argument("--compile-mode", choices=COMPILE_MODES, default="default", help="Inductor's mode")
    parser.add_argument("--runs", type=int, default=50, help="measured rounds (%(default)s)")
    parser.add_argument("--warmup", type=int, default=5, help="rounds before them (%(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch, and of ONNX Runtime on a CPU (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and inputs (%(default)s)")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results"), help="folder of the results (%(default)s)"
    )
    return parser
