"""What a calibration will take, reckoned from one layer."""

from dataclasses import replace

import pytest
import torch

from evla_compile.calibration import forecast as module
from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.forecast import Forecast, forecast, most_trials, stream_bytes
from evla_compile.calibration.streams import Shelf, Stream, batches_of
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.settings.config import CompileConfig

CONFIG = CompileConfig(keep_layers=3, mlp_keep=1.0, visual_tokens=5, text_tokens=9)


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    pixels = torch.zeros(56, 56, 3, dtype=torch.uint8).numpy()
    return [Frame(pixels, "go"), Frame(pixels, "turn it off"), Frame(pixels, "go")]


@pytest.fixture(scope="module")
def run(small_policy: CogACT, frames: list[Frame]) -> tuple[DenseRun, Stream]:
    run = DenseRun(capture(small_policy, CONFIG), batches_of(small_policy, frames), Shelf())
    start = run.start("front")
    start.advance(run.front)
    return run, start


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ({"repair": "none"}, 0),
        ({"repair": "last"}, 3),
        ({"repair": "all"}, 9),
        ({"repair": "gaps", "repair_rho": 0.1}, 2),
        ({"keep_layers": None, "visual_tokens": None}, 0),
    ],
)
def test_trials_are_the_scopes_and_strengths(settings: dict[str, object], trials: int, small_policy: CogACT) -> None:
    config = replace(CONFIG, **settings)  # type: ignore[arg-type]  # settings of different types
    assert most_trials(config, small_policy.sizes) == trials


def test_activations_are_those_of_every_row_and_stream(small_policy: CogACT, frames: list[Frame]) -> None:
    batches = batches_of(small_policy, frames)
    rows = sum(16 + len(small_policy.processor.prompt_ids(frame.instruction)) for frame in frames)
    assert stream_bytes(small_policy, batches, trials=0) == 3 * rows * 32 * 4
    assert stream_bytes(small_policy, batches, trials=2) == (3 + 4 * 3) * rows * 32 * 4


def test_time_is_that_of_the_first_layer_times_the_work(
    run: tuple[DenseRun, Stream], small_policy: CogACT, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(module, "perf_counter", lambda: float(next(ticks)))  # a second from any look to the next
    dense = replace(CompileConfig.dense(text_tokens=9))
    stretches = run[0].walk.count_to(run[0].layers[0].exit) - run[0].walk.count_to(run[0].front)
    (batch, _), *_ = run[1]
    layers, per_frame = 4, stretches / len(batch.places)
    for count in (3, 300):
        found = forecast(small_policy, *run, dense, count)
        assert found.seconds == pytest.approx(layers * per_frame * count + 2 * layers * stretches)
    repaired = forecast(small_policy, *run, CONFIG, 300)
    assert repaired.seconds > 2 * found.seconds
    assert repaired.size > found.size == forecast(small_policy, *run, dense, 3).size * 100


@pytest.mark.parametrize(("seconds", "text"), [(20.4, "about 20 seconds"), (900.0, "about 15 minutes")])
def test_it_says_time_and_memory(seconds: float, text: str) -> None:
    assert str(Forecast(frames=200, seconds=seconds, size=2_000_000)).startswith(text)
    assert str(Forecast(frames=200, seconds=seconds, size=2_000_000)).endswith("of activations for 200 frames")
