"""Success of policies in Meta-World, compared episode by episode.

    python -m benchmarks.closed_loop.evaluation --variant dense --variant efficientvla --episodes 5
    python -m benchmarks.closed_loop.evaluation --policy RUN --variant dense --variant mine=ARTIFACT --out FOLDER

Every variant starts from the same initial states with the same initial noises. A variant is one of two kinds:

1. a recipe by name (see --list), applied to the policy of --policy, by default the one that the package contains;
2. NAME=PATH of a run directory, an artifact or an ONNX file.

NAME@torch runs a recipe in torch instead of ONNX Runtime. With --out, results are written to a folder, and an
evaluation that was stopped continues where it was.
"""

import argparse
import hashlib
import json
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from benchmarks.closed_loop.evaluation.episode_strips import draw_strips
from benchmarks.closed_loop.evaluation.recipes import RECIPES
from benchmarks.closed_loop.evaluation.report import console_tables, draw_plot, summarize, to_markdown
from benchmarks.closed_loop.evaluation.rollout import Deviation, EpisodeResult, Execution, Worker
from benchmarks.closed_loop.evaluation.variants import Prepared, Variant, parse_variant, prepare
from benchmarks.closed_loop.simulation.environment import simulator_lack
from benchmarks.closed_loop.simulation.tasks import EVALUATION_SEEDS, MAX_STEPS, TASKS
from benchmarks.conditions import command_line
from evla_compile.demo.demo import describe_machine
from evla_compile.demo.shipped_policy import DEMO_POLICY
from evla_compile.errors import EvlaError
from evla_compile.families.cogact.loading.checkpoint import load
from evla_compile.families.cogact.loading.run_directory import find_checkpoint
from evla_compile.host.frames import Frame, read_frames

_VERSIONS = ("evla-compile", "metaworld", "mujoco", "numpy", "onnxruntime", "torch")
_workers: list[Worker] = []  # the one of this process


@dataclass(frozen=True, kw_only=True, slots=True)
class _Work:
    variant: str
    task: str
    seed: int
    deviations: bool = False


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate, print the tables, and write them where --out says."""
    parser = _parser()
    given = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    if given.list:
        for name, recipe in RECIPES.items():
            console.print(f"{name:20} {recipe}", markup=False, highlight=False)
        return 0
    try:
        variants = [parse_variant(text) for text in given.variant or ("dense", "efficientvla")]
        names = [variant.name for variant in variants]
        if len(set(names)) < len(names):
            raise ValueError(f"--variant: {', '.join(names)} are not all different")
        for option, named in (("--reference", [given.reference or names[0]]), ("--strips", given.strips)):
            if not set(named) <= set(names):
                raise ValueError(f"{option} {' '.join(named)}: expected among {', '.join(names)}")
        if lack := simulator_lack():
            raise EvlaError(lack)
        with _folder(given.out) as folder:
            results, conditions = _evaluate(given, variants, folder, console)
    except (EvlaError, ValueError) as error:
        console.print(f"error: {error}", style="red", markup=False)
        return 2
    reference = given.reference or names[0]
    for condition in conditions:
        console.print(condition, markup=False, highlight=False, soft_wrap=False)
    console.print()
    for table in console_tables(results, reference):
        console.print(table, soft_wrap=False)
    if given.out is not None:
        console.print(f"written to {given.out}: {', '.join(sorted(file.name for file in given.out.glob('*.*')))}")
    return 0


def _evaluate(
    given: argparse.Namespace, variants: Sequence[Variant], folder: Path, console: Console
) -> tuple[dict[str, Any], list[str]]:
    source = given.policy or DEMO_POLICY
    reference = given.reference or variants[0].name
    execution = Execution(execute=None if given.execute == "ensemble" else int(given.execute), threads=1)
    calibration = given.calibration or source / "calibration"
    frames = read_frames(calibration) if given.calibration or calibration.exists() else []
    settings: dict[str, Any] = {
        "policy": hashlib.sha256(find_checkpoint(source).read_bytes()).hexdigest(),
        "calibration": _digest(frames),
        "execution": asdict(execution),
        "versions": {name: version(name) for name in _VERSIONS},
        "max_steps": MAX_STEPS,
    }
    _check_settings(folder / "settings.json", settings)
    prepared = prepare_all(variants, source, frames, folder / "variants", console)
    seeds = range(given.first_seed, given.first_seed + given.episodes)
    # seeds outside, variants inside: so other load on the machine affects all variants alike
    work = [_Work(variant=v.name, task=task, seed=seed) for seed in seeds for task in given.tasks for v in variants]
    extra = [
        _Work(variant=reference, task=task, seed=seed, deviations=True)
        for seed in seeds[: given.deviation_episodes]
        for task in given.tasks
    ]
    episodes, deviations = _run([*work, *extra], prepared, execution, folder, given.workers, console)
    results = summarize(episodes, deviations, prepared, reference)
    conditions = [
        f"{given.episodes} episodes a task, seeds {seeds[0]} to {seeds[-1]}, at most {MAX_STEPS} control steps;"
        f" the variants share initial states and noises; reference: {reference}",
        "a call each step, adaptive ensemble"
        if execution.execute is None
        else f"{execution.execute} of 16 actions of a chunk executed between two calls",
        "ms a call: median, batch 1, from frame and instruction to actions, first call of an episode left out,"
        f" {given.workers} processes beside each other, {describe_machine(execution.threads)}",
        f"MuJoCo {version('mujoco')}, Meta-World {version('metaworld')}; policy sha256 {settings['policy'][:16]}",
        f"{datetime.now(UTC):%Y-%m-%d}: {command_line('benchmarks.closed_loop.evaluation')}",
    ]
    if given.out is not None:
        document = {
            "settings": settings,
            "conditions": conditions,
            "machine": describe_machine(execution.threads),
            "date": f"{datetime.now(UTC):%Y-%m-%d}",
            "reference": reference,
            "variants": results,
        }
        (folder / "results.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        (folder / "results.md").write_text(to_markdown(results, reference, conditions), encoding="utf-8")
        draw_plot(results, reference, folder / "results.png")
        if given.strips:
            with console.status("episode strips"):
                shown = {name: prepared[name] for name in dict.fromkeys((reference, *given.strips))}
                draw_strips(shown, execution, given.tasks, seeds[0], folder / "strips.png")
    return results, conditions


def prepare_all(
    variants: Sequence[Variant], source: Path, frames: Sequence[Frame], folder: Path, console: Console
) -> dict[str, Prepared]:
    """Compile and export variants, unless the folder has them; see `prepare`."""
    policy = load(source)
    prepared = {}
    with progress_bar(console) as progress:
        for variant in progress.track(variants, description="compile and export"):
            prepared[variant.name] = prepare(variant, policy, source, frames, folder / variant.name)
    return prepared


def _run(
    work: Sequence[_Work],
    prepared: Mapping[str, Prepared],
    execution: Execution,
    folder: Path,
    workers: int,
    console: Console,
) -> tuple[list[EpisodeResult], list[Deviation]]:
    """Run the items without results in the folder, and return the results of all items in order."""
    kept = _Records(folder)
    missing = [item for item in work if not kept.has(item, prepared)]
    # spawned, since neither a renderer nor ONNX Runtime survives a fork
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(min(workers, max(1, len(missing))), _start, (dict(prepared), execution)) as pool,
        progress_bar(console) as progress,
    ):
        done = pool.imap_unordered(_do, missing)
        for item, lines in progress.track(done, total=len(missing), description="episodes"):
            kept.add(item, lines)
    episodes = [EpisodeResult.from_json(kept.found[item][0]) for item in work if not item.deviations]
    deviations = [
        Deviation(**line)
        for item in work
        if item.deviations
        for line in kept.found[item]
        if line["variant"] in prepared
    ]
    return episodes, deviations


class _Records:
    """The lines of `episodes.jsonl`, by their work item."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "episodes.jsonl"
        self.found: dict[_Work, list[dict[str, Any]]] = {}
        lines = self._file.read_text(encoding="utf-8").splitlines() if self._file.exists() else []
        for line in lines:
            entry = json.loads(line)
            self.found[_Work(**entry["work"])] = entry["results"]

    def has(self, item: _Work, prepared: Mapping[str, Prepared]) -> bool:
        """Tell whether an item is done; deviations must be there for all prepared variants."""
        found = self.found.get(item)
        if found is None or not item.deviations:
            return found is not None
        return {line["variant"] for line in found} >= set(prepared)

    def add(self, item: _Work, results: list[dict[str, Any]]) -> None:
        self.found[item] = results
        with self._file.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"work": asdict(item), "results": results}) + "\n")


def _start(prepared: Mapping[str, Prepared], execution: Execution) -> None:
    _workers.append(Worker(prepared, execution))


def _do(item: _Work) -> tuple[_Work, list[dict[str, Any]]]:
    (worker,) = _workers
    if item.deviations:
        return item, [asdict(found) for found in worker.deviations(item.variant, item.task, item.seed)]
    return item, [worker.episode(item.variant, item.task, item.seed).to_json()]


def _digest(frames: Sequence[Frame]) -> str:
    found = hashlib.sha256()
    for image, instruction in frames:
        found.update(np.asarray(image).tobytes() + instruction.encode())
    return found.hexdigest()


def _check_settings(file: Path, settings: Mapping[str, Any]) -> None:
    if not file.exists():
        file.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        return
    found = json.loads(file.read_text(encoding="utf-8"))
    differing = sorted(name for name in settings if found.get(name) != settings[name])
    if differing:
        raise ValueError(
            f"{file.parent} holds an evaluation with other settings ({', '.join(differing)}): choose another --out"
        )


@contextmanager
def _folder(out: Path | None) -> Iterator[Path]:
    if out is None:
        with TemporaryDirectory() as scratch:
            yield Path(scratch)
    else:
        out.mkdir(parents=True, exist_ok=True)
        yield out


def progress_bar(console: Console) -> Progress:
    """Return a bar with the count of items, and the time used and left."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=console)


def _execute(text: str) -> str:
    if text != "ensemble" and not (text.isdecimal() and 1 <= int(text) <= 16):
        raise argparse.ArgumentTypeError(f"{text}: expected 1 to 16, or ensemble")
    return text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.closed_loop.evaluation", description=(__doc__ or "").partition("\n")[0]
    )
    for option, settings, text in (
        ("--policy", {"type": Path}, "run directory that recipes are applied to (default: the shipped one)"),
        ("--calibration", {"type": Path}, "folder of frames with a frames.jsonl (default: calibration in --policy)"),
        (
            "--variant",
            {"action": "append", "metavar": "NAME[=PATH][@BACKEND]"},
            "may be repeated (default: dense and efficientvla)",
        ),
        ("--reference", {}, "variant that the others are compared with (default: the first)"),
        ("--episodes", {"type": int, "default": 100}, "episodes of each task (default: %(default)s)"),
        ("--tasks", {"nargs": "+", "choices": TASKS, "default": list(TASKS)}, "which tasks (default: all)"),
        (
            "--first-seed",
            {"type": int, "default": EVALUATION_SEEDS},
            "seed of the first episode (default: %(default)s)",
        ),
        (
            "--execute",
            {"type": _execute, "default": "8"},
            "actions of a chunk to execute, or ensemble (default: %(default)s)",
        ),
        (
            "--deviation-episodes",
            {"type": int, "default": 1},
            "episodes of each task to compare actions on (default: %(default)s)",
        ),
        ("--workers", {"type": int, "default": 2}, "processes, each with one thread (default: %(default)s)"),
        ("--out", {"type": Path}, "folder for results; goes on with what it holds"),
        (
            "--strips",
            {"nargs": "+", "default": [], "metavar": "VARIANT"},
            "draw strips.png of the first episodes, for --out",
        ),
        ("--list", {"action": "store_true"}, "list the recipes and stop"),
    ):
        parser.add_argument(option, help=text, **settings)
    return parser
