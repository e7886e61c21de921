"""Does the instruction decide? The same half-open windows, with the instruction to open and to close them.

    python -m benchmarks.closed_loop.evaluation.instruction_swap --episodes 50

Both window tasks share their scene, and from a half-open window neither frame nor arm shows the task.
"""

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.closed_loop.evaluation.rollout import call_noise
from benchmarks.closed_loop.simulation.environment import SimEnvironment, simulator_lack
from benchmarks.closed_loop.simulation.tasks import EVALUATION_SEEDS, MAX_STEPS, TASKS
from benchmarks.conditions import command_line
from evla_compile.demo.demo import describe_machine
from evla_compile.demo.shipped_policy import DEMO_POLICY
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT

INSTRUCTIONS = tuple(TASKS[task].instruction for task in ("window-open", "window-close"))
OUTCOMES = ("opened", "closed", "neither")
OPENED, CLOSED = 0.15, 0.05
"""Slides in metres, of 0.2, from which and up to which a window counts as opened and as closed: Meta-World's limits."""
EXECUTED = 8
"""Actions of a chunk executed between two calls."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the episodes, print how they ended, and write it where --json says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policy", type=Path, default=DEMO_POLICY, help="run directory (default: the shipped one)")
    parser.add_argument("--episodes", type=int, default=50, help="episodes of each instruction (default: 50)")
    parser.add_argument("--json", type=Path, help="file to write the counts to")
    given = parser.parse_args(arguments)
    if lack := simulator_lack():
        parser.error(lack)
    torch.set_num_threads(1)
    policy, console = load(given.policy), Console(soft_wrap=True)
    counts: dict[str, Counter[str]] = {instruction: Counter() for instruction in INSTRUCTIONS}
    with SimEnvironment(TASKS["window-open"]) as environment:
        for seed in track(range(EVALUATION_SEEDS, EVALUATION_SEEDS + given.episodes), console=console):
            for instruction in INSTRUCTIONS:
                counts[instruction][_outcome(environment, policy, instruction, seed)] += 1
    console.print(_table(counts))
    if given.json is not None:
        contents = {
            "conditions": f"{given.episodes} half-open windows, seeds from {EVALUATION_SEEDS}, dense policy in torch;"
            f" MuJoCo {version('mujoco')}, Meta-World {version('metaworld')}; {describe_machine(1)};"
            f" {datetime.now(UTC):%Y-%m-%d}: {command_line('benchmarks.closed_loop.evaluation.instruction_swap')}",
            "counts": {instruction: {o: counts[instruction][o] for o in OUTCOMES} for instruction in INSTRUCTIONS},
        }
        given.json.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")


def _outcome(environment: SimEnvironment, policy: CogACT, instruction: str, seed: int) -> str:
    environment.reset(seed, half_open=True)
    action = policy.sizes.action
    for call in range(-(-MAX_STEPS // EXECUTED)):
        noise = call_noise((1, action.chunk, action.action_width), noise=0, task="swap", seed=seed, call=call)
        for step in policy.predict_action(environment.frame(), instruction, noise=noise)[:EXECUTED]:
            environment.step(step)
            slide = environment.window_slide()
            if slide >= OPENED:
                return "opened"
            if slide <= CLOSED:
                return "closed"
    return "neither"


def _table(counts: Mapping[str, Mapping[str, int]]) -> Table:
    table = Table("instruction", *OUTCOMES)
    for instruction, found in counts.items():
        table.add_row(instruction, *(str(found[outcome]) for outcome in OUTCOMES))
    return table


if __name__ == "__main__":
    main()
