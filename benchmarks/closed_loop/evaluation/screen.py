"""Cost and action deviation of many variants, to choose those that are worth an evaluation.

    python -m benchmarks.closed_loop.evaluation.screen --variant dense --variant l6-m50-t8-n5 --out FOLDER

The first variant drives episodes of seeds that no evaluation uses, and all are asked at each of its frames, from equal
noise. Then all are timed in turn, one thread each. FOLDER can be that of an evaluation, which goes on with what was
compiled here.
"""

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.closed_loop.evaluation.evaluate import prepare_all, progress_bar
from benchmarks.closed_loop.evaluation.rollout import Execution, Worker
from benchmarks.closed_loop.evaluation.variants import Prepared, parse_variant
from benchmarks.closed_loop.simulation.environment import simulator_lack
from benchmarks.closed_loop.simulation.tasks import TASKS
from benchmarks.conditions import command_line
from evla_compile.demo.demo import describe_machine, measure_latencies
from evla_compile.demo.shipped_policy import DEMO_POLICY, demo_frame
from evla_compile.errors import EvlaError
from evla_compile.host.frames import read_frames
from evla_compile.settings.budgets.budget import decision_of
from evla_compile.settings.budgets.repair import RepairDecision
from evla_compile.settings.plan import Plan

SCREENING_SEEDS = 9000
"""First seed of the episodes that variants are screened on."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Screen variants, and print and write what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closed_loop.evaluation.screen", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--variant", action="append", required=True, help="as of the evaluation; may be repeated")
    parser.add_argument("--policy", type=Path, default=DEMO_POLICY, help="run directory (default: the shipped one)")
    parser.add_argument("--calibration", type=Path, help="folder of frames (default: calibration in --policy)")
    parser.add_argument("--episodes", type=int, default=4, help="episodes of each task (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=60, help="timed calls of each variant (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="folder for the variants and screen.json")
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        if lack := simulator_lack():
            raise EvlaError(lack)
        frames = read_frames(given.calibration or given.policy / "calibration")
        variants = [parse_variant(text) for text in given.variant]
        prepared = prepare_all(variants, given.policy, frames, given.out / "variants", console)
        rows = list(screen(prepared, episodes=given.episodes, runs=given.runs, console=console))
    except (EvlaError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    found = {
        "command": command_line("benchmarks.closed_loop.evaluation.screen"),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": describe_machine(1),
        "calls": given.runs,
        "episodes": given.episodes * len(TASKS),
        "rows": rows,
    }
    (given.out / "screen.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    console.print(_table(rows), soft_wrap=False)
    return 0


def screen(prepared: Mapping[str, Prepared], *, episodes: int, runs: int, console: Console) -> Iterator[dict[str, Any]]:
    """Yield what is known of each variant, JSON-ready; the first one is the reference."""
    reference, execution = next(iter(prepared)), Execution(execute=8, threads=1)
    worker = Worker(prepared, execution)
    work = [(task, SCREENING_SEEDS + number) for number in range(episodes) for task in TASKS]
    apart: dict[str, list[float]] = {name: [] for name in prepared}
    with progress_bar(console) as progress:
        for task, seed in progress.track(work, description="deviations"):
            for found in worker.deviations(reference, task, seed):
                apart[found.variant].append(found.millimetres)
    frame = demo_frame()
    policies = {name: each.open(1) for name, each in prepared.items()}
    calls = {
        name: lambda policy=policy: policy.predict_action(frame.image, frame.instruction, seed=0)
        for name, policy in policies.items()
    }
    times = {latency.name: latency.median for latency in measure_latencies(calls, runs)}
    for name, each in prepared.items():
        plan = None if each.plan is None else Plan.load(each.plan)
        yield {
            "variant": name,
            "millimetres": mean(apart[name]),
            "standard_error": stdev(apart[name]) / len(apart[name]) ** 0.5,
            "milliseconds": times[name],
            "speed_up": times[reference] / times[name],
            "gflop": None if each.flops is None else each.flops / 1e9,
            "layers": each.config.get("keep_layers"),
            "repair": None if plan is None else asdict(decision_of(RepairDecision, plan.decisions)),
        }


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = Table("variant", "mm", "ms", "speed-up", "repair", "layers")
    for row in rows:
        repair, layers = row["repair"], row["layers"]
        table.add_row(
            row["variant"],
            f"{row['millimetres']:.2f} ± {row['standard_error']:.2f}",
            f"{row['milliseconds']:.1f}",
            f"{row['speed_up']:.2f}",
            "" if repair is None else f"{repair['scope']} {repair['rho']:g}",
            "" if layers is None else " ".join(map(str, layers)),
        )
    return table


if __name__ == "__main__":
    raise SystemExit(main())
