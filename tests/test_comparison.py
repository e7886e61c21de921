"""What `evla estimate` compares: sizes by name, configurations by option, and refusals before anything is counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from evla_compile.comparison import compare, configurations, sizes_of
from evla_compile.config import PRESETS, CompileConfig
from evla_compile.errors import CheckpointError
from evla_compile.model.policy import ModelSizes
from evla_compile.sizes import published_sizes


@pytest.mark.parametrize(
    ("given", "published"), [("S", "small"), ("b", "base"), ("L", "large"), ("base", "base"), ("Large", "large")]
)
def test_published_models_go_by_name_and_initial(given: str, published: str) -> None:
    assert sizes_of(given).action.depth == {"small": 6, "base": 12, "large": 24}[published]
    assert sizes_of(given) == published_sizes(published)  # type: ignore[arg-type]  # a parameter is any string


def test_other_names_are_run_directories(tiny_checkpoint: Path, tmp_path: Path) -> None:
    assert sizes_of(str(tiny_checkpoint)).language.layers == 6
    with pytest.raises(CheckpointError):
        sizes_of(str(tmp_path / "base"))


def test_without_a_choice_everything_is_compared() -> None:
    assert list(configurations([], dense=False, text_tokens=26)) == ["dense", *PRESETS]


@pytest.mark.parametrize(
    ("presets", "dense", "expected"),
    [
        ((), True, ["dense"]),
        (("l22-t56", "l28-t56"), False, ["l22-t56", "l28-t56"]),
        (("l22-t56",), True, ["dense", "l22-t56"]),
        (("all",), False, list(PRESETS)),
        (("all",), True, ["dense", *PRESETS]),
    ],
)
def test_a_choice_is_followed(presets: tuple[str, ...], dense: bool, expected: list[str]) -> None:
    found = configurations(presets, dense=dense, text_tokens=20)
    assert list(found) == expected
    for name, config in found.items():
        base = CompileConfig.dense() if name == "dense" else PRESETS[name]
        assert config == replace(base, text_tokens=20)


def test_upstream_comes_first_and_every_step_is_told(small_sizes: ModelSizes) -> None:
    told: list[str] = []

    @contextmanager
    def step(what: str) -> Iterator[None]:
        told.append(what)
        yield

    config = CompileConfig.dense(text_tokens=9, ddim_steps=1)
    found = compare(small_sizes, {"dense": config}, dtype=torch.float32, step=step)
    assert list(found) == ["upstream", "dense"]
    assert found["dense"].total.flops < found["upstream"].total.flops
    assert told == ["count upstream's graph", "count the graphs of dense"]


def test_a_budget_that_does_not_fit_is_refused_by_its_name_before_anything_is_counted(small_sizes: ModelSizes) -> None:
    def step(what: str) -> None:
        raise AssertionError(what)

    with pytest.raises(ValueError, match=r"mine: keep_layers=22: the decoder has 4 layers; use keep_layers=1 to 4"):
        compare(small_sizes, {"mine": CompileConfig(keep_layers=22)}, dtype=torch.float32, step=step)  # type: ignore[arg-type]
