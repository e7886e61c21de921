"""The counters of a loaded policy's calls."""

import time

import numpy as np
import pytest

from evla_compile.runtime import latency
from evla_compile.runtime.latency import INCLUDES, LatencyCounter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that the next calls take, in order."""
    waiting: list[float] = []
    now = [0.0, 0]

    def perf_counter() -> float:
        now[1] += 1
        if now[1] % 2 == 0:
            now[0] += waiting.pop(0)
        return float(now[0])

    monkeypatch.setattr(latency, "perf_counter", perf_counter)
    return waiting


def call(counter: LatencyCounter, kind: str, times: list[float], clock: list[float]) -> None:
    clock.extend(times)
    for _ in times:
        with counter.timing(kind):
            pass


def test_percentiles_are_of_all_calls_but_the_first(clock: list[float]) -> None:
    counter = LatencyCounter()
    times = [0.001 * value for value in range(1, 101)]
    call(counter, "graph", [5.0, *times], clock)
    (found,) = counter.summary()
    assert (found.kind, found.count) == ("graph", 100)
    assert found.first == pytest.approx(5000.0)
    assert [found.median, found.p95, found.p99] == pytest.approx(list(np.percentile(range(1, 101), (50, 95, 99))))
    assert found.includes == INCLUDES["graph"]


def test_a_single_call_stands_for_itself(clock: list[float]) -> None:
    counter = LatencyCounter()
    call(counter, "call", [0.25], clock)
    (found,) = counter.summary()
    assert (found.count, found.first, found.median, found.p99) == (0, 250.0, 250.0, 250.0)


def test_only_the_latest_calls_are_kept(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(latency, "KEPT_CALLS", 3)
    counter = LatencyCounter()
    call(counter, "graph", [9.0, 1.0, 2.0, 3.0, 4.0, 5.0], clock)
    (found,) = counter.summary()
    assert (found.count, found.median, found.first) == (3, 4000.0, 9000.0)


def test_a_call_that_fails_is_not_counted() -> None:
    counter = LatencyCounter()
    with pytest.raises(ValueError, match="no"), counter.timing("graph"):
        raise ValueError("no")
    assert counter.summary() == ()


def test_kinds_are_apart_and_can_be_forgotten() -> None:
    counter = LatencyCounter()
    with counter.timing("call"), counter.timing("graph"):
        time.sleep(0.001)
    graph, whole = counter.summary()
    assert 1.0 <= graph.first <= whole.first
    counter.reset()
    assert counter.summary() == ()
