"""Times the ways to run a policy in torch: eager, torch.compile(policy, backend="evla"), and to_torch.

Every path is compared with the compiled graph before anything is timed, and all are then called in turn. Weights are
random; plans are stand-ins, so the actions are meaningless, but times do not depend on that.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

import evla_compile as evla
from benchmarks.conditions import command_line
from benchmarks.latency.backends import draw_inputs
from benchmarks.latency.policies import random_weight
from benchmarks.latency.rows import SIZES
from benchmarks.latency.timing import Stopwatch, describe_machine, measure
from evla_compile import __version__
from evla_compile.estimate.estimates import skeleton
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.inputs import to_tensors
from evla_compile.settings.config import PAPER_TEXT_TOKENS, CompileConfig
from evla_compile.settings.plan import stand_in_plan
from evla_compile.settings.tolerances import relative_error

TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far a path's samples may be from the compiled graph's; Inductor fuses, and so rounds, otherwise in bfloat16."""


def make_policy(size: str, device: torch.device, dtype: torch.dtype, seed: int) -> CogACT:
    """Return a policy with random weights; the action head is float32."""
    policy = skeleton(SIZES[size], dtype=dtype)
    state = {
        name: random_weight(name, tensor.shape, seed=seed, device=device).to(tensor.dtype)
        for name, tensor in policy.state_dict().items()
    }
    policy.load_state_dict(state, assign=True)
    return policy.eval().requires_grad_(False)


def make_paths(policy: CogACT, config: CompileConfig, device: torch.device) -> dict[str, Callable[..., torch.Tensor]]:
    """Return the paths by name; the compiled graph, run eagerly, is that which the others must equal."""
    plan = stand_in_plan(policy.sizes, config)
    compiled = evla.compile(policy, config, plan=plan)
    options: dict[str, Any] = {"config": config, "plan": plan}
    paths: dict[str, Callable[..., torch.Tensor]] = {
        "compiled graph, eager": compiled.to_torch("eager"),
        "dense policy, eager": policy.sample,
        'torch.compile(policy, backend="evla")': torch.compile(policy, backend="evla", options=options),
        'to_torch("inductor")': compiled.to_torch("inductor"),
    }
    if device.type == "cuda":
        paths['to_torch("cudagraphs")'] = compiled.to_torch("cudagraphs")
    return paths


def main() -> None:
    """Time the paths and write JSON and Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=sorted(SIZES), default="demo")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    console, device, dtype = Console(stderr=True), torch.device(settings.device), getattr(torch, settings.dtype)
    sizes = SIZES[settings.size]
    config = replace(CompileConfig.preset("l22-t56"), text_tokens=PAPER_TEXT_TOKENS)
    policy = make_policy(settings.size, device, dtype, seed=0)
    paths = make_paths(policy, config, device)
    inputs = draw_inputs(sizes, seed=0)
    tensors = to_tensors(inputs, device)
    found: dict[str, np.ndarray[Any, Any]] = {}
    for name, path in paths.items():
        with console.status(f"warm up {name}"):
            found[name] = path(*tensors).float().cpu().numpy()
    errors = {name: relative_error(samples, found["compiled graph, eager"]) for name, samples in found.items()}
    for name, error in errors.items():
        if name != "dense policy, eager" and not error <= TOLERANCES[dtype]:
            raise SystemExit(f"{name} is {error:.1e} from the compiled graph, tolerance {TOLERANCES[dtype]:.0e}")

    def calling(path: Callable[..., torch.Tensor]) -> Callable[[Stopwatch], object]:
        return lambda _: path(*to_tensors(inputs, device)).cpu()

    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("timing", total=settings.runs + 3)
        calls = [calling(path) for path in paths.values()]
        latencies = measure(calls, device, warmup=3, runs=settings.runs, step=lambda: bar.advance(task))
    rows = [
        {"path": name, "median, ms": latency.median, "p95, ms": latency.p95, "error": errors[name]}
        for name, latency in zip(paths, latencies, strict=True)
    ]
    result = {
        "command": command_line("benchmarks.latency.torch_paths"),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"evla_compile": __version__, "torch": torch.__version__},
        "machine": describe_machine(device),
        "policy": f"{settings.size}, {settings.dtype}, random weights, stand-in plan, batch 1; {config}",
        "a call": "from arrays in host memory to raw samples in host memory; in turn, after 3 rounds to warm up",
        "runs": settings.runs,
        "rows": rows,
    }
    place = settings.out / f"torch-paths-{settings.size}-{device.type}-{settings.dtype}.json"
    place.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    place.with_suffix(".md").write_text(to_markdown(result), encoding="utf-8")
    print(to_markdown(result))


def to_markdown(result: dict[str, Any]) -> str:
    """Return the result as Markdown."""
    lines = ["| path | median, ms | p95, ms | error against the compiled graph |", "| --- | ---: | ---: | ---: |"]
    lines += [
        f"| `{row['path']}` | {row['median, ms']:.1f} | {row['p95, ms']:.1f} | {row['error']:.1e} |"
        for row in result["rows"]
    ]
    machine = "; ".join(f"{key}: {value}" for key, value in result["machine"].items())
    notes = [
        f"{result['runs']} calls of each, {result['a call']}.",
        f"Policy: {result['policy']}.",
        f"{machine}; torch {result['versions']['torch']}; {result['date']}; `{result['command']}`.",
        "The dense policy's error is what the lossy rewrites do to random weights.",
    ]
    return "\n".join([*lines, "", *notes]) + "\n"


if __name__ == "__main__":
    main()
