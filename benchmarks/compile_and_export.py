"""Times all steps from a policy in memory to its first actions, for the demo's policy, dense and compiled."""

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from evla_compile import runtime
from evla_compile.calibration.calibrate import calibrate
from evla_compile.compiled_policy import compile
from evla_compile.compiler.pipeline import build_passes
from evla_compile.demo.demo import DEMO_CONFIG, describe_machine
from evla_compile.demo.shipped_policy import DEMO_POLICY, calibration_frames, demo_frame
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.run_passes import run_passes
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, plan_without_calibration
from evla_compile.verification.verify import verify

Times = dict[str, float]
"""Seconds by step."""


def main() -> None:
    """Run the benchmark, print a table, and write it as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch and of ONNX Runtime")
    parser.add_argument("--json", type=Path, help="file to write the seconds to")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with TemporaryDirectory() as scratch:
        measured = benchmark(Path(scratch), arguments.threads)
    machine = describe_machine(arguments.threads)
    print_table(measured)
    print(machine)
    if arguments.json is not None:
        results = {"machine": machine, "date": datetime.now(UTC).date().isoformat(), "seconds": measured}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def benchmark(folder: Path, threads: int) -> dict[str, Times]:
    """Return the times of the dense and of the compiled policy."""
    policy = load(DEMO_POLICY)
    dense = CompileConfig.dense()
    capture(policy, dense)  # the first capture of a process includes imports of torch
    measured: dict[str, Times] = {"compiled": {}, "dense": {}}
    with timing(measured["compiled"], "calibrate"):
        plan = calibrate(policy, calibration_frames(), DEMO_CONFIG, progress=False)
    time_variant(
        policy,
        dense,
        plan_without_calibration(policy.sizes, dense),
        folder / "dense",
        threads,
        measured["dense"],
    )
    time_variant(policy, DEMO_CONFIG, plan, folder / "compiled", threads, measured["compiled"])
    return measured


def time_variant(policy: CogACT, config: CompileConfig, plan: Plan, artifact: Path, threads: int, times: Times) -> None:
    """Time all steps of one variant, from the policy to its first actions."""
    with timing(times, "capture"):
        graph = capture(policy, config)
    with timing(times, "passes"):
        run_passes(graph, build_passes(config, plan, policy.sizes))
    compiled = compile(policy, config, plan=plan)
    with timing(times, "export to ONNX"):
        compiled.export(artifact)
    with timing(times, "verify"):
        verify(artifact, threads=threads)
    with timing(times, "load the runtime"):
        loaded = runtime.load(artifact, threads=threads)
    with timing(times, "first actions"):
        loaded.predict_action(*demo_frame())


@contextmanager
def timing(times: Times, name: str) -> Iterator[None]:
    """Add the seconds spent in a `with` block."""
    start = perf_counter()
    yield
    times[name] = perf_counter() - start


def print_table(measured: dict[str, Times]) -> None:
    """Print the times, a variant a column."""
    print(f"{'seconds':20}", *(f"{variant:>12}" for variant in measured))
    for name in dict.fromkeys(name for times in measured.values() for name in times):
        print(f"{name:20}", *(f"{times[name]:12.2f}" if name in times else f"{'-':>12}" for times in measured.values()))


if __name__ == "__main__":
    main()
