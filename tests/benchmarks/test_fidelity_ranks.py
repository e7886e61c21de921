"""The ranking of fidelity figures: outcomes pooled over files, candidates, and what a figure that knows all reaches."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.closed_loop.evaluation import fidelity_ranks as ranks
from benchmarks.closed_loop.evaluation.fidelity_ranks import Outcome, candidates, ceiling, correlations, outcomes
from benchmarks.closed_loop.evaluation.paired_statistics import paired_difference, rank_correlation
from benchmarks.closed_loop.evaluation.recipes import Recipe
from evla_compile.fidelity.chunks import ActionChunks
from evla_compile.fidelity.measure import compare_chunks
from evla_compile.host.frames import Frame
from evla_compile.host.processor import ActionStatistics

STATISTICS = ActionStatistics(low=(-0.05,) * 6 + (0.0,), high=(0.05,) * 6 + (1.0,), mask=(True,) * 6 + (False,))


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [8, 4, 2, 1], -1.0),
        ([1, 2, 3], [2, 1, 3], 0.5),
        ([1, 1, 2], [1, 2, 3], np.sqrt(3) / 2),  # ranks 0.5, 0.5, 2 against 0, 1, 2
    ],
)
def test_rank_correlation_is_spearmans(left: list[float], right: list[float], expected: float) -> None:
    assert rank_correlation(left, right) == pytest.approx(expected)
    assert rank_correlation(np.exp(left), right) == pytest.approx(expected)


def test_rank_correlation_refuses_and_knows_no_ties_of_all() -> None:
    assert np.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    for pair in (([1.0], [1.0]), ([1.0, 2.0], [1.0, 2.0, 3.0])):
        with pytest.raises(ValueError, match="same length, 2 at least"):
            rank_correlation(*pair)


def variant(gained: int, lost: int, episodes: int, layers: tuple[int, ...] = tuple(range(12))) -> dict[str, Any]:
    return {
        "config": {"keep_layers": list(layers)},
        "noise": 0,
        "paired": {"gained": gained, "lost": lost, "episodes": episodes},
    }


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """Two files have `cache-5`, and `layers-8` with other layers in each."""
    first = {
        "dense": variant(0, 0, 100) | {"paired": None},
        "dense-noise-1": variant(1, 1, 100) | {"noise": 1},
        "cache-5": variant(3, 5, 100),
        "layers-8": variant(2, 12, 100, (0, 1, 2, 3, 4, 5, 6, 7)),
    }
    second = {"cache-5": variant(0, 10, 300), "layers-8": variant(1, 4, 100, (0, 1, 2, 3, 8, 9, 10, 11))}
    for name in ranks.FILES:
        variants = first if name == ranks.FILES[0] else second if name == ranks.FILES[1] else {}
        (tmp_path / f"{name}.json").write_text(json.dumps({"variants": variants}), encoding="utf-8")
    return tmp_path


def test_outcomes_of_a_variant_are_pooled_over_files_and_its_layers_are_kept(results: Path) -> None:
    found = {each.name: each for each in outcomes(results)}
    assert set(found) == {"cache-5", "layers-8-l0.1.2.3.4.5.6.7", "layers-8-l0.1.2.3.8.9.10.11"}
    assert (found["cache-5"].difference, found["cache-5"].episodes) == (-12 / 400, 400)
    assert found["cache-5"].recipe.cache_interval == 5
    assert found["cache-5"].recipe.layers == 1.0
    assert found["layers-8-l0.1.2.3.8.9.10.11"].recipe.layers == (0, 1, 2, 3, 8, 9, 10, 11)


def test_the_standard_error_is_that_of_a_paired_difference(results: Path) -> None:
    found = {each.name: each for each in outcomes(results)}["layers-8-l0.1.2.3.4.5.6.7"]
    apart = np.array([1.0] * 2 + [-1.0] * 12 + [0.0] * 86)
    assert found.error == pytest.approx(apart.std() / 10)
    reference, judged = (
        dict(enumerate(side)) for side in (apart <= 0, apart >= 0)
    )  # whoever is not the loser succeeds
    paired = paired_difference(reference, judged)
    assert paired.difference == pytest.approx(found.difference)
    assert (paired.high - paired.low) / (2 * 1.96) == pytest.approx(found.error, rel=0.2)


def test_the_results_of_the_checkout_have_thirty_variants_and_more() -> None:
    found = outcomes(ranks.RESULTS)
    assert len(found) >= 30
    assert all(isinstance(each.recipe, Recipe) for each in found)
    assert 0.9 < ceiling(found) < 1.0


def test_candidates_are_of_the_frames_that_are_named() -> None:
    draw = np.random.Generator(np.random.PCG64(0))
    samples = draw.normal(0.0, 0.2, (2, 6, 16, 7)).clip(-0.9, 0.9).astype(np.float32)
    moved = samples.copy()
    moved[:, :3, :, :3] += np.float32(0.3)
    dense, found = (ActionChunks(samples=each, frames="x") for each in (samples, moved))
    blank = np.zeros((4, 4, 3), dtype=np.uint8)
    frames = [Frame(blank, "a" if place < 3 else "b") for place in range(6)]
    near, far, both = (
        candidates(dense, found, frames, places, STATISTICS) for places in ([3, 4, 5], [0, 1, 2], list(range(6)))
    )
    assert set(near.values()) == {0.0}
    assert both["calls that end beyond own noise"] == compare_chunks(dense, found, STATISTICS, frames).beyond_noise
    for name, value in far.items():
        assert value > 0, name
    assert far["end, mean"] == pytest.approx(1000 * 8 * 0.3 * 0.05 * np.sqrt(3), rel=1e-5)
    assert both["end, worst instruction's root mean square"] == pytest.approx(far["end, root mean square"])
    assert both["end, mean"] == pytest.approx(far["end, mean"] / 2)


def test_correlations_are_listed_the_best_first_with_their_interval() -> None:
    found = [
        Outcome(name=f"v{place}", recipe=Recipe(), difference=-0.01 * place, error=0.01, episodes=100)
        for place in range(12)
    ]
    draw = np.random.Generator(np.random.PCG64(0))
    by_variant = {
        each.name: {"noise": float(draw.normal()), "good": -each.difference + 0.02 * float(draw.normal())}
        for each in found
    }
    rows = correlations(found, {"expert's": by_variant, "policy's": by_variant})
    assert [row["figure"] for row in rows] == ["good", "noise"]
    low, high = rows[0]["policy's"]["interval"]
    assert low < rows[0]["policy's"]["value"] < high <= 1.0
