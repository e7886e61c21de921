"""Which figure of fidelity ranks compiled policies as the closed loop does?

    python -m benchmarks.closed_loop.evaluation.fidelity_ranks --out build/fidelity-ranks

Every variant of the closed-loop results is compiled again, with the layers that it had, and run on frames from equal
noise; no episode is. Frames are the shipped ones, which an expert recorded and calibration uses, and others that are
recorded while the dense policy drives, in episodes that no evaluation uses. Each candidate's rank correlation with the
differences in success is printed. FOLDER keeps what was compiled and run, and another call goes on from there.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

import evla_compile as evla
from benchmarks.closed_loop.evaluation.evaluate import progress_bar
from benchmarks.closed_loop.evaluation.paired_statistics import rank_correlation
from benchmarks.closed_loop.evaluation.recipes import RECIPES, Recipe, frontier_recipe
from benchmarks.closed_loop.evaluation.rollout import call_noise
from benchmarks.closed_loop.evaluation.screen import SCREENING_SEEDS
from benchmarks.closed_loop.evaluation.variants import Variant, prepare
from benchmarks.closed_loop.simulation.environment import SimEnvironment, simulator_lack
from benchmarks.closed_loop.simulation.tasks import MAX_STEPS, TASKS
from benchmarks.conditions import command_line
from evla_compile import runtime
from evla_compile.demo.demo import describe_machine
from evla_compile.demo.shipped_policy import DEMO_POLICY, calibration_frames
from evla_compile.errors import EvlaError
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.fidelity.chunks import ActionChunks, sample_chunks
from evla_compile.fidelity.measure import HORIZON, compare_chunks
from evla_compile.host.frames import Frame
from evla_compile.host.processor import ActionStatistics, scale_actions

RESULTS = Path(__file__).parents[2] / "results"
FILES = (
    "closed-loop",
    "closed-loop-confirmation",
    "closed-loop-repair",
    "closed-loop-repair-ablation",
    "closed-loop-frontier",
    "closed-loop-towers-whole",
)
"""Results whose variants are judged."""
DRAWS = 2
"""Noises of each frame."""
PER_EPISODE = 19
"""Frames of an episode that the dense policy drives, at most: all of its calls."""
SAMPLES = 2_000
"""Draws of every interval."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What a variant lost in closed loop, over all files that have it."""

    name: str
    """Its name; with its layers where files have different ones under one name."""
    recipe: Recipe
    """How it is compiled: the recipe of its name, with the layers that it had."""
    difference: float
    """Success minus that of the dense policy on the same episodes, -1 to 1."""
    error: float
    """Standard error of the difference."""
    episodes: int
    """Episodes."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile, run, rank, and write FOLDER/ranks.json."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closed_loop.evaluation.fidelity_ranks",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--episodes", type=int, default=12, help="driven episodes of each task (default: %(default)s)")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    try:
        if lack := simulator_lack():
            raise EvlaError(lack)
        given.out.mkdir(parents=True, exist_ok=True)
        policy, found = load(DEMO_POLICY), outcomes(RESULTS)
        expert, driven = calibration_frames(), drive(policy, given.episodes, console)
        chunks = run(policy, found, [*expert, *driven], given.out, console)
    except (EvlaError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    frames = [*expert, *driven]
    parts = {"expert's": range(len(expert)), "policy's": range(len(expert), len(frames)), "both": range(len(frames))}
    (statistics,) = policy.processor.statistics.values()
    figures = {
        name: {
            each.name: candidates(chunks["dense"], chunks[each.name], frames, list(places), statistics)
            for each in found
        }
        for name, places in parts.items()
    }
    ranks = correlations(found, figures)
    document = {
        "command": command_line("benchmarks.closed_loop.evaluation.fidelity_ranks"),
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "machine": describe_machine(1),
        "frames": {name: len(places) for name, places in parts.items()},
        "draws": DRAWS,
        "ceiling": ceiling(found),
        "correlations": ranks,
        "variants": [
            {"variant": each.name, "difference": each.difference, "error": each.error, "episodes": each.episodes}
            | {name: by_variant[each.name] for name, by_variant in figures.items()}
            for each in found
        ],
    }
    (given.out / "ranks.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    console.print(_table(ranks), soft_wrap=False)
    return 0


def outcomes(results: Path) -> list[Outcome]:
    """Return every variant of the results that differs from the dense policy, its differences pooled."""
    seen: dict[tuple[str, tuple[int, ...]], list[Mapping[str, Any]]] = {}
    for file in FILES:
        for name, variant in json.loads((results / f"{file}.json").read_text(encoding="utf-8"))["variants"].items():
            if variant["paired"] and not variant["noise"] and not name.startswith("dense"):
                seen.setdefault((name, tuple(variant["config"]["keep_layers"])), []).append(variant["paired"])
    names = [name for name, _ in seen]
    found = []
    for (name, layers), paired in sorted(seen.items()):
        recipe = RECIPES.get(name) or frontier_recipe(name)
        if recipe is None:
            raise ValueError(f"{name} of {', '.join(FILES)} is no recipe any more")
        episodes = sum(each["episodes"] for each in paired)
        # of a paired difference: (gained + lost - (gained - lost)^2 / n) / n^2
        gained, lost = (sum(each[kind] for each in paired) for kind in ("gained", "lost"))
        spread = (gained + lost - (gained - lost) ** 2 / episodes) / episodes**2
        label = name if names.count(name) == 1 else f"{name}-l{'.'.join(map(str, layers))}"
        found.append(
            Outcome(
                name=label,
                recipe=replace(recipe, layers=layers) if recipe.layers != 1.0 else recipe,
                difference=(gained - lost) / episodes,
                error=float(np.sqrt(spread)),
                episodes=episodes,
            )
        )
    return found


def drive(policy: CogACT, episodes: int, console: Console) -> list[Frame]:
    """Return frames of episodes that the dense policy drives, evenly spread over its calls."""
    found: list[Frame] = []
    shape = (1, policy.sizes.action.chunk, policy.sizes.action.action_width)
    work = [(name, SCREENING_SEEDS + number) for name in TASKS for number in range(episodes)]
    with progress_bar(console) as progress:
        for name, seed in progress.track(work, description="the dense policy drives"):
            task, seen = TASKS[name], list[Frame]()
            with SimEnvironment(task) as environment:
                environment.reset(seed)
                for call in range(-(-MAX_STEPS // HORIZON)):
                    seen.append(Frame(environment.frame(), task.instruction, f"{name}-{seed}"))
                    noise = call_noise(shape, noise=0, task=name, seed=seed, call=call)
                    chunk = policy.predict_action(seen[-1].image, task.instruction, noise=noise)
                    if any(environment.step(action) for action in chunk[:HORIZON]):
                        break
            places = np.unique(np.linspace(0, len(seen) - 1, PER_EPISODE).round().astype(int))
            found += [seen[place] for place in places]
    return found


def run(
    policy: CogACT, found: Sequence[Outcome], frames: Sequence[Frame], folder: Path, console: Console
) -> dict[str, ActionChunks]:
    """Return the chunks of the dense policy and of every variant, those that the folder has from there."""
    calibration = calibration_frames()
    chunks: dict[str, ActionChunks] = {}
    with progress_bar(console) as progress:
        for name, recipe in progress.track(
            [("dense", None), *((each.name, each.recipe) for each in found)], description="compile and run"
        ):
            file = folder / f"{name}.npz"
            if not file.exists():
                if recipe is None:
                    new = evla.record_chunks(policy, frames, draws=DRAWS, progress=False)
                else:
                    variant = Variant(name=name, backend="onnx", recipe=recipe)
                    prepared = prepare(variant, policy, DEMO_POLICY, calibration, folder / "variants" / name)
                    with runtime.load(prepared.artifact or "", threads=1) as compiled:
                        new = sample_chunks(compiled, frames, DRAWS)
                new.save(file)
            chunks[name] = ActionChunks.load(file)
    return chunks


def candidates(
    dense: ActionChunks,
    found: ActionChunks,
    frames: Sequence[Frame],
    places: Sequence[int],
    statistics: ActionStatistics,
) -> dict[str, float]:
    """Return every candidate figure on the frames at some places."""
    right, left = (replace(each, samples=each.samples[:, list(places)]) for each in (dense, found))
    fidelity = compare_chunks(right, left, statistics, [frames[place] for place in places])
    actions = [scale_actions(each.samples[:, :, :HORIZON], statistics)[..., :3] for each in (right, left)]
    ends = 1000.0 * np.linalg.norm((actions[1] - actions[0]).sum(axis=2), axis=-1)  # [R,F]
    steps = 1000.0 * np.linalg.norm(actions[1] - actions[0], axis=-1).mean(axis=-1)  # [R,F]
    instructions = np.array([frames[place].instruction for place in places])
    raw = np.abs(left.samples - right.samples)
    return {
        "drift, worst instruction": fidelity.drift,
        "drift, mean over instructions": float(np.mean([each.drift for each in fidelity.instructions])),
        "calls that end beyond own noise": fidelity.beyond_noise,
        "end, root mean square": _norm(ends, 2),
        "end, mean": float(ends.mean()),
        "end, 95th percentile": fidelity.end.p95,
        "end, worst frame": fidelity.end.worst,
        "end, worst instruction's root mean square": max(
            _norm(ends[:, instructions == each], 2) for each in np.unique(instructions)
        ),
        "action, root mean square": _norm(steps, 2),
        "action, mean": fidelity.step.mean,
        "action, fourth-power mean": _norm(steps, 4),
        "samples, mean": float(np.abs(np.clip(left.samples, -1, 1) - np.clip(right.samples, -1, 1)).mean()),
        "samples, worst over the largest": float((raw.max(axis=(2, 3)) / np.abs(right.samples).max(axis=(2, 3))).max()),
    }


def correlations(
    found: Sequence[Outcome], figures: Mapping[str, Mapping[str, Mapping[str, float]]]
) -> list[dict[str, Any]]:
    """Return each candidate's rank correlation with what was lost, by frames, with its interval; the best first."""
    lost = np.array([-each.difference for each in found])
    rows = []
    for candidate in next(iter(next(iter(figures.values())).values())):
        row: dict[str, Any] = {"figure": candidate}
        for name, by_variant in figures.items():
            values = np.array([by_variant[each.name][candidate] for each in found])
            row[name] = {"value": rank_correlation(values, lost), "interval": _interval(values, lost)}
        rows.append(row)
    return sorted(rows, key=lambda row: -row["policy's"]["value"])


def ceiling(found: Sequence[Outcome]) -> float:
    """Return what a figure that knew the true losses would reach, since the losses are measured on few episodes."""
    draw = np.random.Generator(np.random.PCG64(0))
    true, error = (np.array([getattr(each, name) for each in found]) for name in ("difference", "error"))
    return float(np.mean([rank_correlation(true, draw.normal(true, error)) for _ in range(1000)]))


def _interval(values: NDArray[np.float64], lost: NDArray[np.float64]) -> tuple[float, float]:
    """Return the 95 % interval of a rank correlation, by drawing variants with replacement."""
    draw = np.random.Generator(np.random.PCG64(0))
    chosen = draw.integers(0, len(lost), (SAMPLES, len(lost)))
    found = [rank_correlation(values[rows], lost[rows]) for rows in chosen]
    low, high = np.nanpercentile(found, (2.5, 97.5))
    return float(low), float(high)


def _norm(values: NDArray[np.float64], power: int) -> float:
    return float(np.mean(values**power) ** (1 / power))


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    names = [name for name in rows[0] if name != "figure"]
    table = Table("figure", *(f"frames: {name}" for name in names))
    for row in rows:
        table.add_row(row["figure"], *(f"{row[name]['value']:.3f}" for name in names))
    return table


if __name__ == "__main__":
    raise SystemExit(main())
