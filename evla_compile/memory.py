"""Free memory of the machine, and the peak memory of this process, from Linux's /proc; no torch."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

BUILD_FACTOR = 3.2
"""Peak memory of an engine build over the bytes of its graph's weights, as measured with TensorRT-RTX 1.7."""

BUILD_BASE_BYTES = 700_000_000
"""Memory that such a build takes in addition, whatever the weights."""

_MEMINFO, _STATUS = Path("/proc/meminfo"), Path("/proc/self/status")
_SAMPLE_SECONDS = 0.02


@dataclass(slots=True)
class PeakMemory:
    """Peak memory of this process in bytes; complete when `watching_memory` ends."""

    private: int = 0
    """Anonymous memory, without mapped files: what the machine must have at least. Sampled every 20 ms."""
    resident: int = 0
    """All resident pages, those of mapped files included, which the system takes back when it needs them."""


def build_bytes(weight_bytes: int) -> int:
    """Return the bytes of memory that building an engine takes, from the bytes of its graph's weights."""
    return round(BUILD_FACTOR * weight_bytes) + BUILD_BASE_BYTES


def available_memory() -> int | None:
    """Return the bytes that a program can still take without swapping; None where the system does not report it."""
    return _field(_MEMINFO, "MemAvailable")


@contextmanager
def watching_memory() -> Iterator[PeakMemory]:
    """Measure the peak memory of this process within a `with` block; stays 0 where the system does not report it."""
    peak, stop = PeakMemory(), threading.Event()

    def sample() -> None:
        peak.private = max(peak.private, _field(_STATUS, "RssAnon") or 0)
        peak.resident = max(peak.resident, _field(_STATUS, "VmRSS") or 0)

    def watch() -> None:
        while not stop.wait(_SAMPLE_SECONDS):
            sample()

    thread = threading.Thread(target=watch, name="peak memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        stop.set()
        thread.join()
        sample()


def _field(file: Path, name: str) -> int | None:
    """Return a field of a /proc file in bytes."""
    if not file.exists():
        return None
    for line in file.read_text(encoding="ascii").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return 1024 * int(value.split()[0])
    return None
