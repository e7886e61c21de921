"""What `evla estimate` compares: sizes by name, and refusals before anything is counted."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from evla_compile.errors import CheckpointError
from evla_compile.estimate.comparison import compare, sizes_of
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes, published_sizes


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
