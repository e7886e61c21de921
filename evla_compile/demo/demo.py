"""The demo: compile, export, verify and time a small trained policy.

It shows that all steps work and how long they take; whether a robot still does its task is measured by
benchmarks/closed_loop.
"""

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray

from evla_compile import runtime
from evla_compile.arguments import whole_number
from evla_compile.compiled_policy import CompiledPolicy, compile
from evla_compile.compiler.pipeline import COMPARED_FRAMES
from evla_compile.compiler.report import CompileReport
from evla_compile.demo.shipped_policy import DEMO_POLICY, calibration_frames, demo_frame
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.inputs import to_tensors
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import GraphInputs, InputSignature
from evla_compile.host.picture import draw_kept_tokens
from evla_compile.runtime import RuntimePolicy
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import plan_without_calibration
from evla_compile.verification.verify import Verification, verify

DEMO_CONFIG = CompileConfig()
"""The paper's budgets in proportion, 8 of 12 layers and 14 of 64 visual tokens, with which the demo's policy solves its
tasks as often as the dense one; see docs/results/quality.md."""
PICTURE = "kept-tokens.png"
"""File of the demo's folder that shows which visual tokens are kept."""
WARM_UP_CALLS = 3
"""Calls of each backend before the measured ones."""

Step: TypeAlias = Callable[[str], AbstractContextManager[object]]
"""Called with a description of a step; returns a context to run it in, such as a progress display or a stopwatch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Time of one call of a backend."""

    name: str
    """The backend."""
    median: float
    """Median, in milliseconds."""
    p95: float
    """95th percentile, in milliseconds."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoVariant:
    """One compilation of the demo's policy, exported and verified."""

    name: str
    """`dense` or `compiled`."""
    report: CompileReport
    """Reports of its passes, and the deviation of its graph from the dense policy."""
    verification: Verification
    """Errors of ONNX Runtime against its graph."""
    onnx_bytes: int
    """Size of the ONNX file, external data included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoResult:
    """Results of the demo."""

    variants: tuple[DemoVariant, ...]
    """The dense and the compiled policy."""
    latencies: tuple[Latency, ...]
    """Dense PyTorch, dense ONNX and compiled ONNX."""
    conditions: str
    """What a latency includes, and what it was measured on."""
    instruction: str
    """The task in words."""
    kept_tokens: NDArray[np.int64]
    """Patches of the demo's frame that the compiled policy keeps, ascending, [K]."""
    patches: int
    """Patches of a frame."""
    actions: NDArray[np.float64]
    """Action chunk [A,7] of the compiled ONNX for the demo's frame and the instruction."""


def run_demo(
    folder: Path,
    *,
    runs: int,
    threads: int,
    step: Step,
    config: CompileConfig = DEMO_CONFIG,
) -> DemoResult:
    """Compile, export, verify and time the policy that the package contains.

    Args:
        folder: an existing folder for the artifacts `dense` and `compiled` and the picture `kept-tokens.png`.
        runs: measured calls of each backend, at least 1.
        threads: threads of torch and of ONNX Runtime.
        step: entered around each long step.
        config: settings of the compiled variant; the dense one has the same sampler settings and text budget.

    Raises:
        OSError: the picture cannot be written.
        ArtifactError: an artifact cannot be written.
        ValueError: `runs` or `threads` is no whole number from 1 up.
        VerificationError: ONNX Runtime does not return what a graph does.
    """
    runs, threads = whole_number("runs", runs, low=1), whole_number("threads", threads, low=1)
    with _torch_threads(threads):
        with step("load the policy: CogACT's architecture, trained in simulation"):
            policy = load(DEMO_POLICY)
        frames, shown = calibration_frames(), demo_frame()
        dense = CompileConfig.dense(
            ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale, text_tokens=config.text_tokens
        )
        compiled = {}
        with step("dense: capture and rewrite the graph"):
            plan = plan_without_calibration(policy.sizes, dense)
            compiled["dense"] = compile(policy, dense, calibration=frames[:COMPARED_FRAMES], plan=plan, progress=False)
        with step(f"compiled: calibrate on {len(frames)} frames of other episodes, repair, rewrite the graph"):
            compiled["compiled"] = compile(policy, config, calibration=frames, progress=False)
        variants = tuple(
            _export(policy, folder / name, threads=threads, step=step) for name, policy in compiled.items()
        )
        kept = compiled["compiled"].kept_tokens(*shown)
        picture = draw_kept_tokens(shown.image, kept, policy.sizes.patches, instruction=shown.instruction)
        picture.save(folder / PICTURE)
        backends = {name: runtime.load(folder / name, threads=threads) for name in compiled}
        with step(f"time {runs} calls of each backend"):
            latencies = measure_latencies(_backend_calls(policy, backends, shown, config), runs)
    return DemoResult(
        variants=variants,
        latencies=latencies,
        conditions="A latency is that of one call, batch 1, float32, from the squashed frame and the token ids in"
        f" memory to the raw samples: {runs} calls of each backend in turn after {WARM_UP_CALLS} to warm up;"
        f" {describe_machine(threads)}.",
        instruction=shown.instruction,
        kept_tokens=kept,
        patches=policy.sizes.patches,
        actions=backends["compiled"].predict_action(*shown),
    )


def measure_latencies(calls: Mapping[str, Callable[[], object]], runs: int) -> tuple[Latency, ...]:
    """Time calls in turn, so that other load on the machine affects all alike.

    Raises:
        ValueError: `runs` is below 1.
    """
    runs = whole_number("runs", runs, low=1)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(WARM_UP_CALLS + runs):
        for name, call in calls.items():
            start = perf_counter()
            call()
            times[name].append(1e3 * (perf_counter() - start))
    measured = {name: np.percentile(values[WARM_UP_CALLS:], (50, 95)) for name, values in times.items()}
    return tuple(Latency(name=name, median=float(p50), p95=float(p95)) for name, (p50, p95) in measured.items())


def describe_machine(threads: int) -> str:
    """Return one line with the conditions of a time: machine, threads, versions."""
    installed = [name for name in ("torch", "onnxruntime") if find_spec(name) is not None]
    versions = ", ".join(f"{name} {version(name)}" for name in installed)
    return (
        f"{threads} of {os.cpu_count()} CPUs ({cpu_field('model name')}), {platform.system()} {platform.machine()},"
        f" Python {platform.python_version()}, {versions}"
    )


def cpu_field(name: str) -> str:
    """Return a field of the first CPU in /proc/cpuinfo; platform.processor() is empty on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "unknown")


def _export(compiled: CompiledPolicy, artifact: Path, *, threads: int, step: Step) -> DemoVariant:
    name = artifact.name
    with step(f"{name}: export it to ONNX"):
        compiled.export(artifact)
    with step(f"{name}: verify it on ONNX Runtime"):
        verification = verify(artifact, threads=threads)
    size = sum(file.stat().st_size for file in artifact.glob("model.onnx*"))
    return DemoVariant(name=name, report=compiled.report, verification=verification, onnx_bytes=size)


def _backend_calls(
    policy: CogACT, backends: Mapping[str, RuntimePolicy], frame: Frame, config: CompileConfig
) -> dict[str, Callable[[], object]]:
    """Return calls that sample an action chunk from the same inputs: the policy run eagerly, then each backend."""
    signature = InputSignature.of(policy.sizes, batch_size=1, text_tokens=config.text_tokens)
    inputs = GraphInputs.prepare(policy.processor, frame.image, frame.instruction, signature)
    image, ids, length, start = to_tensors(inputs, torch.device("cpu"))

    def eager() -> object:
        return policy.sample(image, ids, length, start, ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale)

    def sampling(backend: RuntimePolicy) -> Callable[[], object]:
        return lambda: backend.sample(*inputs.arrays)

    return {
        "dense PyTorch, eager": eager,
        **{f"{name} ONNX": sampling(backend) for name, backend in backends.items()},
    }


@contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
