"""Streams between two layers: in memory or in files, of all batches or of some."""

from pathlib import Path

import pytest
import torch

from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.streams import Shelf, Stream, batches_of
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.settings.config import CompileConfig


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (40, 56, 56, 3), dtype=torch.uint8, generator=generator).numpy()
    return [Frame(image, "go" if place < 20 else "turn it off") for place, image in enumerate(pixels)]


def start(policy: CogACT, frames: list[Frame], shelf: Shelf) -> tuple[DenseRun, Stream]:
    run = DenseRun(capture(policy, CompileConfig.dense(text_tokens=9)), batches_of(policy, frames), shelf)
    stream = run.start("front")
    stream.advance(run.front)
    return run, stream


def test_files_hold_what_memory_holds(small_policy: CogACT, frames: list[Frame], tmp_path: Path) -> None:
    features = []
    for shelf in (Shelf(), Shelf(tmp_path)):
        run, stream = start(small_policy, frames, shelf)
        dense = stream.fork("dense")
        dense.advance(run.readout)
        features.append(run.features(dense))
        dense.close()
        stream.close()
    assert torch.equal(*features)
    assert list(tmp_path.iterdir()) == []


def test_some_batches_are_spread_over_all(small_policy: CogACT, frames: list[Frame]) -> None:
    run, stream = start(small_policy, frames, Shelf())
    some = stream.thinned("some", 16)
    places = sorted(place for batch in some.batches for place in batch.places)
    assert len(some.batches) == 3  # of six: eight, eight and four frames of each instruction
    assert {frames[place].instruction for place in places} == {"go", "turn it off"}
    dense, part = stream.fork("dense"), some.fork("part")
    for each in (dense, part):
        each.advance(run.readout)
    assert torch.equal(run.features(part), run.features(dense)[places])
    assert len(stream.thinned("all", 40).batches) == len(stream.batches)


def test_what_is_protected_outlives_its_stream(tmp_path: Path) -> None:
    shelf = Shelf(tmp_path)
    for name in ("a", "b"):
        shelf.write(name, {"x": torch.ones(2), "n": 3})
    shelf.protect(frozenset({"a"}))
    assert [shelf.holds(name) for name in ("a", "b")] == [True, False]
    shelf.drop("a")
    found = shelf.read("a", torch.device("cpu"))
    assert (found["x"].tolist(), found["n"]) == ([1.0, 1.0], 3)
    shelf.protect(frozenset())
    assert list(tmp_path.iterdir()) == []
