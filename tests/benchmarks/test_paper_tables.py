"""`python -m benchmarks.paper`: what it counts on small policies, what it lets pass, and CogACT-Base itself."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.paper import counts, published, tables
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes, published_sizes

ROWS = 16 + 26
"""Sequence length of the small policy: patches and text tokens."""


@pytest.fixture(scope="module")
def sizes(small_sizes: ModelSizes) -> ModelSizes:
    """Sizes whose MLP is wide enough to be cut."""
    return replace(small_sizes, language=replace(small_sizes.language, mlp_width=256))


@pytest.fixture(scope="module")
def counter(sizes: ModelSizes) -> Any:
    return counts.Counter({"base": sizes}, lambda line: None)


@pytest.fixture(scope="module")
def dense() -> CompileConfig:
    config: CompileConfig = published.setting()
    return replace(config, ddim_steps=2)


def test_the_dense_policy_has_every_parameter(counter: Any, sizes: ModelSizes, dense: CompileConfig) -> None:
    with torch.device("meta"):
        state = UpstreamCogACT(sizes).state_dict()
    parameters = counter.count("base", dense).parameters
    assert parameters["language"] == sum(t.numel() for name, t in state.items() if name.startswith("llm_backbone."))
    assert parameters["action"] == sum(t.numel() for name, t in state.items() if name.startswith("action_model."))
    assert sum(parameters.values()) == sum(tensor.numel() for tensor in state.values())


def test_what_the_rewrites_remove_is_taken_off(counter: Any, dense: CompileConfig) -> None:
    cut = counter.count("base", replace(dense, keep_layers=3, mlp_keep=0.75, visual_tokens=7, cache_interval=2))
    whole = counter.count("base", dense)
    removed = {component: whole.parameters[component] - cut.parameters[component] for component in whole.parameters}
    assert removed == {
        "vision": 0,
        "language": (4 * 32**2 + 3 * 32 * 256 + 2 * 32) + 3 * (3 * 32 * 64),
        "action": 0,
    }
    before = 2 * ROWS * (4 * (4 * 32**2 + 3 * 32 * 256) + 32 * 64)
    behind = 2 * (2 * ROWS + 7 + 26) * (4 * 32**2 + 3 * 32 * 192) + 2 * (7 + 26) * 32 * 64
    assert (whole.flops["language"], cut.flops["language"]) == (before, behind)
    assert whole.flops["vision"] == cut.flops["vision"]
    block = 2 * 12 * (4 * 20**2 + 2 * 20 * 44) + 2 * 4 * 12 * 20 + 12 * 44
    assert whole.flops["action"] - cut.flops["action"] == 2 * block


def test_a_row_that_selects_tokens_is_counted_in_both_readings(counter: Any, dense: CompileConfig) -> None:
    rows = [
        published.Row(
            2, "selected", replace(dense, visual_tokens=7), ((("total", "%"), "50.0"), (("language", "M"), "0.1"))
        ),
        published.Row(5, "dense", dense, ((("total", "%"), None),)),
    ]
    share, millions, whole = tables.compare(rows, counter)
    base = sum(counter.count("base", dense).flops.values())
    for found, tokens in ((share.strict, 7), (share.ours, 7 + 4)):
        kept = sum(counter.count("base", replace(dense, visual_tokens=tokens)).flops.values())
        assert found == pytest.approx(100 * kept / base)
    assert (share.table, share.row, share.published) == (2, "selected", "50.0")
    assert millions.ours == millions.strict == counter.count("base", dense).parameters["language"] / 1e6
    assert (whole.ours, whole.strict, whole.published) == (100.0, None, None)


@pytest.mark.parametrize(
    ("unit", "printed", "ours", "agrees"),
    [
        ("M", "802.3", 802.297, True),
        ("M", "802.3", 802.24, False),
        ("B", "4.78", 4.7859, True),  # cut off
        ("B", "7.85", 7.849, True),  # rounded
        ("B", "4.78", 4.7901, False),
        ("B", "4.78", 4.774, False),
        ("%", "32.9", 33.04, True),
        ("%", "32.9", 33.06, False),
        ("%", "32.9", 32.74, False),
        ("TFLOP", "2.25", 2.256, True),
        ("TFLOP", "2.25", 2.257, False),
        ("GFLOP", "57.96", 58.01, True),
        ("GFLOP", "57.96", 58.03, False),
        ("%", None, 12.3, True),
    ],
)
def test_a_figure_agrees_within_its_tolerance(
    unit: published.Unit, printed: str | None, ours: float, agrees: bool
) -> None:
    found = tables.Comparison(table=1, row="row", quantity=("total", unit), published=printed, ours=ours, strict=None)
    assert found.agrees is agrees


def test_steps_lead_from_upstream_to_the_compiled_policy(counter: Any, dense: CompileConfig) -> None:
    config = replace(dense, keep_layers=3, mlp_keep=0.75, visual_tokens=7, cache_interval=2)
    upstream, head, towers, late, *passes = counts.exact_steps(counter, config, lambda line: None)
    assert upstream.paper == sum(counter.count("base", dense).flops.values())
    assert upstream.paper - head.paper == upstream.all - head.all == 2 * ROWS * 32 * 64
    dino = 2 * 19 * (4 * 16**2 + 2 * 16 * 28) + 2 * 5 * 19 * 16 + 19 * 28
    siglip = 2 * 16 * (4 * 12**2 + 2 * 12 * 26) + 2 * 5 * 16 * 12 + 16 * 26
    assert head.paper - towers.paper == dino + siglip
    assert towers.paper > late.paper
    assert [step.name for step in passes] == [
        "PruneLayers",
        "PruneMLP",
        "SelectTokens",
        "CacheFeatures",
        "NarrowLastLayer",
        "SpecializeShapes",
        "FoldConstants",
    ]
    paper = [step.paper for step in (late, *passes)]
    assert paper == sorted(paper, reverse=True)
    assert all(step.all > step.paper for step in (upstream, *passes))


@pytest.fixture
def run(
    sizes: ModelSizes,
    counter: Any,
    dense: CompileConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Any:
    """Runs the script on a small policy, with one row and two steps, and returns its exit status."""

    def main(printed: str, left: int) -> int:
        row = published.Row(4, "all tokens", dense, ((("total", "%"), printed),))
        steps = [counts.Step(name=name, paper=ops, all=ops + 1) for name, ops in (("upstream", 1000), ("end", left))]
        monkeypatch.setattr(tables, "PUBLISHED", (row,))
        monkeypatch.setattr(tables, "Counter", lambda *_: counter)
        monkeypatch.setattr(tables, "exact_steps", lambda *_: tuple(steps))
        files = [f"--{kind}={tmp_path / kind}" for kind in ("markdown", "json")]
        monkeypatch.setattr("sys.argv", ["python", *files])
        return tables.main()

    return main


def test_figures_that_agree_exit_with_success(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("100.0", 269) == 0
    markdown = (tmp_path / "markdown").read_text(encoding="utf-8")
    assert "| all tokens | total, % | 100.0 | 100.00 | - |  |" in markdown
    assert "| end | 0.00 | 26.90 | -73.100 | 0.00 | 26.97 |" in markdown
    numbers = json.loads((tmp_path / "json").read_text(encoding="utf-8"))
    assert numbers["steps"][1] == {"name": "end", "paper": 269, "all": 270}
    assert numbers["tables"][0]["published"] == "100.0"
    shown = capsys.readouterr()
    assert "fit T + 4" in " ".join(shown.out.split())
    assert "OFF" not in shown.out + markdown
    assert shown.err == ""


def test_a_figure_that_is_off_fails_the_run(run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("99.0", 269) == 1
    shown = capsys.readouterr()
    assert "OFF" in shown.out
    assert "OFF" in (tmp_path / "markdown").read_text(encoding="utf-8")
    assert "Table 4, all tokens" in shown.err


def test_too_many_operations_behind_all_rewrites_fail_the_run(run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("100.0", 270) == 1
    assert "27.00 % of upstream's operations, expected 26.9 at most" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ("Ex0", (None, 1.0, None, 1)),
        ("Ex1", (None, 1.0, 56, 1)),
        ("Ex2", (None, 1.0, None, 5)),
        ("Ex3", (22, 1.0, 56, 1)),
        ("Ex4", (22, 0.75, None, 1)),
        ("Ex5", (22, 0.75, None, 5)),
        ("Ex6", (None, 1.0, 56, 5)),
        ("Ex7", (22, 0.75, 56, 5)),
    ],
)
def test_an_ablation_row_has_the_settings_that_its_ticks_say(row: str, settings: tuple[object, ...]) -> None:
    (config,) = [r.config for r in published.PUBLISHED if r.table == 5 and r.name.startswith(row)]
    assert (config.keep_layers, config.mlp_keep, config.visual_tokens, config.cache_interval) == settings


def test_every_published_row_can_be_counted_in_both_readings() -> None:
    assert {row.table for row in published.PUBLISHED} == {1, 2, 3, 4, 5}
    for row in published.PUBLISHED:
        tokens, patches = row.config.visual_tokens, published_sizes(row.size).patches
        assert row.config.text_tokens == 26
        assert tokens is None or tokens + published.EXTRA_TOKENS <= patches
        assert all(printed is None or math.isfinite(float(printed)) for _, printed in row.figures)


def test_cogact_base_counts_as_published() -> None:
    # Full size on meta tensors: half a minute, nearly all of it in torch.export.
    base = counts.Counter({"base": published_sizes("base")}, lambda line: None).count("base", published.setting())
    assert {component: flops / 1e9 for component, flops in base.flops.items()} == pytest.approx(
        {"vision": 405.50, "language": 3726.55, "action": 57.96}, rel=1e-3
    )
    assert {component: round(count / 1e6, 1) for component, count in base.parameters.items()} == {
        "vision": 802.3,
        "language": 6738.9,
        "action": 89.0,
    }
