"""What the closed-loop evaluation compares and how it reports it; the simulator itself is in test_closed_loop."""

import ast
import io
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor, fx

from benchmarks.closed_loop.evaluation import evaluate
from benchmarks.closed_loop.evaluation.layer_rules import OtherRule
from benchmarks.closed_loop.evaluation.recipes import PAPER, RECIPES, Recipe
from benchmarks.closed_loop.evaluation.report import _spans, console_tables, draw_plot, summarize, to_markdown
from benchmarks.closed_loop.evaluation.rollout import Deviation, EpisodeResult, call_noise
from benchmarks.closed_loop.evaluation.variants import (
    Prepared,
    RandomTokens,
    Variant,
    make_plan,
    parse_variant,
)
from benchmarks.closed_loop.training.episodes import CHUNK
from benchmarks.closed_loop.training.policy import demo_sizes, initialize
from benchmarks.closed_loop.training.tokenizer import PAD_ID, VOCABULARY, make_tokenizer
from evla_compile.demo.demo import DEMO_CONFIG
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.host.processor import Processor
from evla_compile.passes import ExposeStages, SelectTokens


@pytest.fixture(scope="module")
def policy() -> CogACT:
    """A policy of the demo's sizes before any training."""
    processor = Processor(tokenizer_json=make_tokenizer(), statistics={}, image_side=112, pad_id=PAD_ID)
    torch.manual_seed(0)
    policy = CogACT(demo_sizes(VOCABULARY, CHUNK), processor)
    initialize(policy)
    return policy.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    pixels = np.random.Generator(np.random.PCG64(2)).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)
    return [Frame(pixels[0], "open the door"), Frame(pixels[1], "close the window")]


def test_the_papers_row_is_kept_in_proportion(policy: CogACT) -> None:
    config = PAPER.config(policy.sizes)
    assert (config.keep_layers, config.mlp_keep, config.visual_tokens) == (8, 0.75, 14)
    assert (config.key_tokens, config.cache_interval, config.ddim_steps) == (1, 5, 10)
    dense = Recipe().config(policy.sizes)
    assert (dense.keep_layers, dense.visual_tokens, dense.cache_interval) == (None, None, 1)


def test_every_recipe_fits_the_demo_policy(policy: CogACT) -> None:
    configs = {name: recipe.config(policy.sizes) for name, recipe in RECIPES.items()}
    assert configs["layers-9"].keep_layers == 9
    assert [configs[f"tokens-{share}"].visual_tokens for share in (44, 22, 11)] == [28, 14, 7]
    assert configs["dense"] == configs["dense-again"] == configs["dense-noise-1"]
    assert configs["coverage-repair"] == DEMO_CONFIG.resolve(policy.sizes)


def test_without_the_simulator_an_evaluation_stops_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mujoco", None)  # as if it were not installed
    assert evaluate.main(["--out", str(tmp_path / "out")]) == 2
    assert "run `make sim`" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_no_benchmark_imports_the_simulator_before_it_is_needed() -> None:
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    found = [
        f"{file.relative_to(benchmarks)}:{node.lineno}"
        for file in sorted(benchmarks.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if (name or "").partition(".")[0] in ("metaworld", "mujoco", "gymnasium")
    ]
    assert found == []


def test_recipes_are_listed_by_what_they_drop(capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate.main(["--list"]) == 0
    listed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert list(listed) == list(RECIPES)
    assert listed["dense"] == listed["dense-again"] == "everything kept"
    assert listed["dense-noise-1"] == "initial noises of set 1"
    assert listed["random-layers-2"] == "67% of the decoder layers (random, draw 2)"
    assert listed["random-tokens"] == "22% of the visual tokens (random in every call)"
    assert listed["ddim-5"] == "5 denoising steps"
    assert listed["efficientvla"] == (
        "69% of the decoder layers (importance), 75% of the MLP neurons, 22% of the visual tokens, cache N=5"
    )


def test_layer_rules_choose_different_layers(policy: CogACT, frames: list[Frame]) -> None:
    def kept(rule: OtherRule, seed: int = 0) -> tuple[int, ...]:
        return make_plan(policy, Recipe(layers=8 / 12, layer_rule=rule, layer_seed=seed), frames).keep_layers

    assert kept("last") == tuple(range(8))
    draws = {kept("random", seed) for seed in (1, 2)}
    assert len(draws) == 2
    assert all(len(draw) == 8 for draw in draws)
    assert 11 in kept("keep-last")
    plan = make_plan(policy, Recipe(layers=8 / 12), frames)
    least = sorted(range(12), key=lambda layer: plan.layer_importance[layer])[:4]
    assert plan.keep_layers == tuple(layer for layer in range(12) if layer not in least)


def test_random_tokens_are_drawn_from_the_noise(
    small_graph: fx.GraphModule, small_inputs: tuple[Tensor, Tensor, Tensor, Tensor]
) -> None:
    control, report = RandomTokens(visual_tokens=6, key_tokens=2, task_share=0.5, patches=16)(small_graph)
    chosen, _ = SelectTokens(visual_tokens=6, key_tokens=2, task_share=0.5)(small_graph)
    assert report.changes == 1
    kept = [ExposeStages(stages=("kept_patches",))(graph)[0] for graph in (control, chosen)]
    timestep = torch.tensor([7.0])
    (drawn,), (selected,) = (graph(*small_inputs, timestep) for graph in kept)
    expected = small_inputs[3].flatten(1)[:, :16].argsort(dim=1, stable=True)[:, :6].sort(dim=1).values
    assert torch.equal(drawn, expected)
    assert not torch.equal(drawn, selected)
    other = (*small_inputs[:3], small_inputs[3].flip(2), timestep)
    assert not torch.equal(kept[0](*other)[0], drawn)


def test_variants_are_named_on_the_command_line(tmp_path: Path) -> None:
    assert parse_variant("dense") == Variant(name="dense", backend="onnx", recipe=RECIPES["dense"])
    assert parse_variant("cache-5@torch").backend == "torch"
    (tmp_path / "artifact").mkdir()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    found = parse_variant(f"mine={tmp_path / 'artifact'}")
    assert (found.name, found.backend, found.path) == ("mine", "onnx", tmp_path / "artifact")
    assert parse_variant(f"mine={tmp_path / 'run'}").backend == "torch"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fast", "budgets such as l6-m50-t8-n5, or one of dense"),
        ("dense@cuda", "expected one of onnx, torch"),
        ("mine=absent", "absent does not exist"),
        ("mine=.@torch", "torch runs run directories"),
    ],
)
def test_unknown_variants_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_variant(text)


def test_the_command_refuses_what_it_cannot_compare(capsys: pytest.CaptureFixture[str]) -> None:
    for asked in (["dense", "--variant", "dense"], ["dense", "--reference", "cache-5"], ["fast"]):
        assert evaluate.main(["--policy", "run", "--variant", *asked]) == 2
    printed = capsys.readouterr().out
    for message in ("are not all different", "--reference cache-5: expected among dense", "one of dense"):
        assert message in printed


def test_noise_is_shared_by_variants_and_by_nothing_else() -> None:
    settings = {"noise": 0, "task": "reach", "seed": 5000, "call": 3}
    noise = call_noise((1, 16, 7), **settings)  # type: ignore[arg-type]
    assert (noise == call_noise((1, 16, 7), **settings)).all()  # type: ignore[arg-type]
    for other in ({"noise": 1}, {"task": "door-open"}, {"seed": 5001}, {"call": 4}):
        assert not (noise == call_noise((1, 16, 7), **(settings | other))).any()  # type: ignore[arg-type]


def episode(variant: str, task: str, seed: int, *, success: bool) -> EpisodeResult:
    return EpisodeResult(
        variant=variant, task=task, seed=seed, success=success, steps=50 + seed, milliseconds=(10.0, 12.0 + seed)
    )


def test_the_plot_leaves_out_what_is_empty() -> None:
    assert _spans([80.0, 90.0, 60.0, 70.0]) == [(0.0, 100.0)]
    assert _spans([80.0, 90.0, 3.0, 8.0, 60.0, 70.0, 2.0, 20.0]) == [(58.0, 100.0), (0.0, 22.0)]


def test_results_are_paired_by_episode(tmp_path: Path) -> None:
    recipes = {"dense": RECIPES["dense"], "cache-5": RECIPES["cache-5"]}
    prepared = {
        name: Prepared(
            variant=Variant(name=name, backend="onnx", recipe=recipe),
            policy=tmp_path,
            artifact=tmp_path,
            plan=None,
            config={"keep_layers": [0, 1, 2] if name == "dense" else [0, 2]},
            flops=3_000_000_000,
        )
        for name, recipe in recipes.items()
    }
    episodes = [episode("dense", task, seed, success=seed > 0) for task in ("reach", "door-open") for seed in range(4)]
    episodes += [
        episode("cache-5", task, seed, success=seed != 3) for task in ("door-open", "reach") for seed in range(4)
    ]
    deviations = [Deviation(variant="cache-5", task="reach", seed=0, millimetres=value) for value in (0.5, 1.5)]
    results = summarize(episodes, deviations, prepared, "dense")
    paired = results["cache-5"]["paired"]
    assert (paired["gained"], paired["lost"], paired["episodes"], paired["p_value"]) == (2, 2, 8, 1.0)
    assert results["dense"]["paired"] is None
    assert results["dense"]["all"]["success"]["successes"] == 6
    assert results["dense"]["tasks"]["reach"]["success"]["episodes"] == 4
    assert results["dense"]["all"]["steps"] == 51.5
    assert results["dense"]["all"]["milliseconds"] == pytest.approx(11.0)
    assert results["cache-5"]["deviation_mm"] == 1.0
    text = to_markdown(results, "dense", ["a condition"])
    assert "| cache-5 | 75.0 [41, 93] | +0.0 [" in text
    assert "| 2 / 2 | 1 | 3.00 | 11.0 |" in text
    assert "kept of 3:\n\n| variant | layers |\n|---|---|\n| cache-5 | 0, 2 |\n" in text
    console = Console(width=80, file=io.StringIO())
    console.print(*console_tables({**results, "a-name-of-20-letters": results["cache-5"]}, "dense"))
    printed = console.file.getvalue()  # type: ignore[attr-defined]  # the StringIO above
    assert "a-name-of-20-letters 75.0 [41, 93]" in " ".join(printed.split())
    assert "\u2026" not in printed
    assert max(map(len, printed.splitlines())) <= 80
    draw_plot(results, "dense", tmp_path / "plot.png")
    unknown = {name: result | {"flops": None} for name, result in results.items()}  # of ONNX files by themselves
    draw_plot(unknown, "dense", tmp_path / "unknown.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000
