"""EfficientVLA's tables beside our own counts, taken from graphs that were captured without weights and rewritten.

The last table leaves the paper: what the exact rewrites add, and where each point goes. Exits with status 1 where a
figure is off.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple, get_args

import torch
from rich import box
from rich.console import Console
from rich.table import Table

from benchmarks.paper.counts import Counter, Counts, Step, exact_steps
from benchmarks.paper.published import EXTRA_TOKENS, PUBLISHED, Quantity, Row, Unit, efficient, setting
from evla_compile import __version__
from evla_compile.settings.config import PAPER_TEXT_TOKENS
from evla_compile.settings.sizes import ModelSizes, PublishedName, published_sizes

NOTES = (
    "Ours: CogACT as its public code runs it, captured without weights and rewritten by the paper's four components"
    f" alone, with a prompt of {PAPER_TEXT_TOKENS} text tokens, in the `paper` convention: linear layers and"
    " convolutions, layer norms and GELUs, no attention products, the language head on every position. The published"
    f" rows fit T + {EXTRA_TOKENS} kept visual tokens, although T as the paper defines it counts the key tokens in"
    " (strict T). Random dropping and FastV are a selection of tokens alone. VLA-Cache is not rebuilt. Table 5 prints"
    " no operations: its rows name the published seconds and speed-up instead.\n"
)

SCALES: Mapping[Unit, float] = MappingProxyType({"M": 1e6, "B": 1e9, "GFLOP": 1e9, "TFLOP": 1e12})

SHOWN_DIGITS: Mapping[Unit, int] = MappingProxyType({"M": 2, "B": 3, "GFLOP": 2, "TFLOP": 3, "%": 2})
"""Digits of our own figures."""

POINTS = 0.15
"""How far operations may be from the published ones, in percent of the base policy's."""

MODULE_SHARE = 0.001
"""How far a module's operations may be from the published ones, as a share of them."""

BASE_TERA = 4.19
"""Operations of the base policy as published, TFLOP."""

TARGET_SHARE = 26.9
"""Percent of upstream's operations that all rewrites together may leave, `paper` convention, strict T."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """A published figure and ours."""

    table: int
    """Number of the table."""
    row: str
    """Name of the row."""
    quantity: Quantity
    """What is compared, and its unit."""
    published: str | None
    """As printed; None where only we count."""
    ours: float
    """Our count; at T + 4 tokens where the row selects tokens."""
    strict: float | None
    """Our count at T tokens; None where the row selects none."""

    @property
    def agrees(self) -> bool:
        """Whether ours is the published figure, within its tolerance.

        Parameters must agree in every printed digit, rounded or cut off: the paper prints 4.786 B as 4.78.
        """
        if self.published is None:
            return True
        unit, printed = self.quantity[1], float(self.published)
        if unit in ("M", "B"):
            digits = len(self.published.partition(".")[2])
            return printed in (round(self.ours, digits), math.floor(self.ours * 10**digits) / 10**digits)
        tolerance = {"GFLOP": MODULE_SHARE * printed, "TFLOP": POINTS / 100 * BASE_TERA, "%": POINTS}[unit]
        return abs(self.ours - printed) <= tolerance


def compare(rows: Iterable[Row], counter: Counter) -> tuple[Comparison, ...]:
    """Count every row, those that select tokens in both readings."""
    comparisons = []
    for row in rows:
        config, tokens = row.config, row.config.visual_tokens
        base = counter.count(row.size, replace(setting(), ddim_steps=config.ddim_steps))
        strict = counter.count(row.size, config)
        ours = (
            strict if tokens is None else counter.count(row.size, replace(config, visual_tokens=tokens + EXTRA_TOKENS))
        )
        comparisons += [
            Comparison(
                table=row.table,
                row=row.name,
                quantity=quantity,
                published=published,
                ours=_value(ours, quantity, base),
                strict=None if tokens is None else _value(strict, quantity, base),
            )
            for quantity, published in row.figures
        ]
    return tuple(comparisons)


def _value(counts: Counts, quantity: Quantity, base: Counts) -> float:
    component, unit = quantity
    numbers = counts.parameters if unit in ("M", "B") else counts.flops
    count = sum(numbers.values()) if component == "total" else numbers[component]
    return 100 * count / sum(base.flops.values()) if unit == "%" else count / SCALES[unit]


class Sheet(NamedTuple):
    """A table as text."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def comparison_sheets(comparisons: Sequence[Comparison]) -> list[Sheet]:
    """Return the paper's tables; rows that select no tokens have one reading."""
    header = ("row", "quantity", "published", "ours (T + 4)", "(strict T)", "")
    sheets = {c.table: Sheet(f"Table {c.table} of arXiv 2506.10100", header, []) for c in comparisons}
    for c in comparisons:
        component, unit = c.quantity
        ours, strict = ("-" if v is None else f"{v:.{SHOWN_DIGITS[unit]}f}" for v in (c.ours, c.strict))
        mark = "OFF" if not c.agrees else ""
        sheets[c.table].rows.append((c.row, f"{component}, {unit}", c.published or "-", ours, strict, mark))
    return list(sheets.values())


def step_sheet(steps: Sequence[Step]) -> Sheet:
    """Return the operations after each rewrite, from upstream's policy to the compiled one, in both conventions."""
    header = ("rewrite", "paper, GFLOP", "%", "points", "all, GFLOP", "%")
    first = steps[0]
    rows: list[tuple[str, ...]] = []
    for before, step in pairwise((first, *steps)):
        points = 100 * (step.paper - before.paper) / first.paper
        shares = [f"{100 * share:.2f}" for share in (step.paper / first.paper, step.all / first.all)]
        rows.append(
            (step.name, f"{step.paper / 1e9:.2f}", shares[0], f"{points:.3f}", f"{step.all / 1e9:.2f}", shares[1])
        )
    title = f"Compiled with every rewrite: L=22, MLP 0.75, strict T=56, N=5, {PAPER_TEXT_TOKENS} text tokens"
    return Sheet(title, header, rows)


def to_rich(sheet: Sheet) -> Table:
    """Return a table for the terminal."""
    table = Table(title=sheet.title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for number, name in enumerate(sheet.header):
        table.add_column(name, justify="right" if number > 1 else "left", overflow="fold")
    for row in sheet.rows:
        table.add_row(*row)
    return table


def to_markdown(sheet: Sheet) -> str:
    """Return a table as Markdown."""
    lines = [sheet.header, ("---", *("---:" for _ in sheet.header[1:])), *sheet.rows]
    return "\n".join([f"### {sheet.title}", "", *(f"| {' | '.join(cells)} |" for cells in lines), ""])


def faults(comparisons: Sequence[Comparison], steps: Sequence[Step]) -> list[str]:
    """Return a line for every figure that is off."""
    lines = [
        f"Table {c.table}, {c.row}: {c.quantity} {c.ours:g}, published {c.published}"
        for c in comparisons
        if not c.agrees
    ]
    share = 100 * steps[-1].paper / steps[0].paper
    if share > TARGET_SHARE:
        lines.append(
            f"compiled with every rewrite: {share:.2f} % of upstream's operations, expected {TARGET_SHARE} at most"
        )
    return lines


def main() -> int:
    """Count, print the tables, write them if asked to, and return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.paper", description=__doc__)
    parser.add_argument("--markdown", type=Path, help="file to write the tables to")
    parser.add_argument("--json", type=Path, help="file to write the numbers to")
    arguments = parser.parse_args()
    progress = Console(stderr=True, highlight=False).print
    sizes: Mapping[PublishedName, ModelSizes] = {name: published_sizes(name) for name in get_args(PublishedName)}
    counter = Counter(sizes, progress)
    comparisons, steps = compare(PUBLISHED, counter), exact_steps(counter, efficient(22, 56), progress)
    sheets = [*comparison_sheets(comparisons), step_sheet(steps)]
    Console().print(NOTES)
    for sheet in sheets:
        Console().print(to_rich(sheet))
    conditions = f"evla_compile {__version__}, torch {torch.__version__}, {datetime.now(UTC).date().isoformat()}"
    if arguments.markdown is not None:
        sections = [NOTES, f"Counted by python -m benchmarks.paper; {conditions}.\n", *map(to_markdown, sheets)]
        arguments.markdown.write_text("\n".join(sections), encoding="utf-8")
    if arguments.json is not None:
        numbers = {
            "conditions": conditions,
            "tables": [asdict(c) for c in comparisons],
            "steps": [asdict(step) for step in steps],
        }
        arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")
    off = faults(comparisons, steps)
    for line in off:
        progress(line)
    return 1 if off else 0
