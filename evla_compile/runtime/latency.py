"""Latency of a loaded policy's calls, measured by counters of negligible cost."""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from time import perf_counter

import numpy as np

KEPT_CALLS = 1000
"""Number of latest calls that a summary covers."""

INCLUDES = {
    "graph": "from arrays in host memory to raw samples in host memory, copies and waiting for the device included",
    "call": "from camera frame and instruction to actions: image, tokens, graph and un-normalisation",
}
"""What the time of each kind of call includes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LatencySummary:
    """Times of the latest calls of one kind, in milliseconds; the first call is reported separately."""

    kind: str
    """`graph` or `call`."""
    includes: str
    """What the time includes."""
    count: int
    """Calls that the percentiles cover, at most `KEPT_CALLS`."""
    first: float
    """The first call, which includes warming up."""
    median: float
    """Median; that of the first call where there was no other."""
    p95: float
    """95th percentile."""
    p99: float
    """99th percentile."""


class LatencyCounter:
    """Times of the calls of a policy, which threads may share."""

    def __init__(self) -> None:
        self._first: dict[str, float] = {}
        self._times: dict[str, deque[float]] = {}
        self._lock = Lock()

    @contextmanager
    def timing(self, kind: str) -> Iterator[None]:
        """Time a `with` block as one call of a kind; a call that fails is not counted."""
        start = perf_counter()
        yield
        elapsed = 1e3 * (perf_counter() - start)
        with self._lock:
            if kind in self._first:
                self._times[kind].append(elapsed)
            else:
                self._first[kind], self._times[kind] = elapsed, deque(maxlen=KEPT_CALLS)

    def reset(self) -> None:
        """Forget every call, the first ones too."""
        with self._lock:
            self._first.clear()
            self._times.clear()

    def summary(self) -> tuple[LatencySummary, ...]:
        """Return the figures of every kind that was called."""
        with self._lock:
            return tuple(self._summarize(kind) for kind in INCLUDES if kind in self._first)

    def _summarize(self, kind: str) -> LatencySummary:
        times = list(self._times[kind]) or [self._first[kind]]
        median, p95, p99 = (float(value) for value in np.percentile(times, (50, 95, 99)))
        return LatencySummary(
            kind=kind,
            includes=INCLUDES[kind],
            count=len(self._times[kind]),
            first=self._first[kind],
            median=median,
            p95=p95,
            p99=p99,
        )
