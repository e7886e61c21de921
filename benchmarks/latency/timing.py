"""Measure: calls in turn, the components within a call, and the peak performance of the machine."""

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from time import perf_counter
from types import MappingProxyType
from typing import TypeAlias

import numpy as np
import torch

from evla_compile.demo.demo import cpu_field
from evla_compile.estimate.devices import Device, find_device

_PRODUCT_SIDE = MappingProxyType(
    {
        ("cuda", torch.float32): 8192,
        ("cuda", torch.bfloat16): 8192,
        ("cpu", torch.float32): 2048,
        ("cpu", torch.bfloat16): 512,  # CPUs without instructions for it take a second for this one
    }
)
_STREAM_FLOATS = 64 * 2**20
_PEAK_RUNS = 5
_CLOCK_FIELDS = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,clocks.max.mem,power.draw,power.limit"


class Stopwatch:
    """Marks the moments between a call's components: by CUDA events on a GPU, which do not wait, else by the clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._moments: list[float] = []

    def mark(self) -> None:
        """Mark this moment: on a GPU, the one at which it has done the work given to it so far."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # as torch left it
            event.record()
            self._events.append(event)
        else:
            self._moments.append(perf_counter())

    def intervals(self) -> tuple[float, ...]:
        """Return the milliseconds between the marks; on a GPU, only once all its work is done."""
        if self._cuda:
            return tuple(a.elapsed_time(b) for a, b in pairwise(self._events))
        return tuple(1e3 * (b - a) for a, b in pairwise(self._moments))


Call: TypeAlias = Callable[[Stopwatch], object]
"""One call of a policy, from inputs in host memory to samples in host memory, which marks its components if it can."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Latency:
    """Times of one policy on one backend, in milliseconds."""

    median: float
    """Of the whole call."""
    p95: float
    """Of the whole call."""
    p99: float
    """Of the whole call."""
    modules: tuple[float, ...]
    """Medians of the components within it; empty where the backend cannot time them."""
    calls: tuple[float, ...]
    """Every measured call, in order."""


def measure(
    calls: Sequence[Call], device: torch.device, *, warmup: int, runs: int, step: Callable[[], object]
) -> tuple[Latency, ...]:
    """Time calls in turn, so that other load on the machine, and changing clocks, affect all alike.

    Args:
        calls: what to time.
        device: where they compute.
        warmup: rounds that are not counted.
        runs: rounds that are.
        step: called after each round.

    Raises:
        ValueError: `warmup` is negative or `runs` is below 1.
    """
    if warmup < 0 or runs < 1:
        raise ValueError(f"warmup={warmup}, runs={runs}: expected at least 0 and 1")
    whole: list[list[float]] = [[] for _ in calls]
    modules: list[list[tuple[float, ...]]] = [[] for _ in calls]
    for turn in range(warmup + runs):
        for index, call in enumerate(calls):
            stopwatch = Stopwatch(device)
            start = perf_counter()
            call(stopwatch)
            elapsed = 1e3 * (perf_counter() - start)
            if turn >= warmup:
                whole[index].append(elapsed)
                modules[index].append(stopwatch.intervals())
        step()
    return tuple(map(summarize, whole, modules))


def summarize(whole: Sequence[float], modules: Sequence[tuple[float, ...]]) -> Latency:
    """Return the statistics of measured calls.

    Args:
        whole: milliseconds of every call.
        modules: milliseconds of its components, call by call; empty tuples where there are none.
    """
    median, p95, p99 = (float(value) for value in np.percentile(whole, (50, 95, 99)))
    medians = tuple(float(value) for value in np.median(np.array(modules), axis=0))
    return Latency(median=median, p95=p95, p99=p99, modules=medians, calls=tuple(whole))


def find_roof(device: torch.device) -> Device:
    """Return the peak performance of the device: by its datasheet, or, where none is known, as measured now."""
    known = find_device(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known or measure_roof(device)


def measure_roof(device: torch.device) -> Device:
    """Return what the device does at most with the threads that torch has: large products, and a large copy.

    The bytes that a copy reads and those that it writes both count.
    """
    source, target = torch.randn(_STREAM_FLOATS, device=device), torch.empty(_STREAM_FLOATS, device=device)
    copied = 2 * source.numel() * source.element_size()
    return Device(
        name=describe_processor(device),
        memory_bytes=_memory_bytes(device),
        bandwidth=copied / _best_seconds(lambda: target.copy_(source), device),
        float32_flops=_product_flops(torch.float32, device),
        bfloat16_flops=_product_flops(torch.bfloat16, device),
        source=f"measured in this run with {torch.get_num_threads()} threads of torch: square products of side"
        f" {_PRODUCT_SIDE[device.type, torch.float32]} (bfloat16: {_PRODUCT_SIDE[device.type, torch.bfloat16]}) and a"
        f" copy of {source.nbytes / 1e6:.0f} MB, the best of {_PEAK_RUNS}",
    )


def describe_machine(device: torch.device) -> dict[str, str]:
    """Return the conditions of times: the processor, its host, the threads used."""
    return {
        "processor": describe_processor(device),
        "host": f"{cpu_field('model name')}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
        "threads of torch": str(torch.get_num_threads()),
    }


def describe_clocks(device: torch.device) -> str:
    """Return the clocks of this moment: the GPU's by nvidia-smi where that is installed, else the first CPU's."""
    if device.type == "cpu" or not shutil.which("nvidia-smi"):
        return f"CPU {cpu_field('cpu MHz')} MHz"
    query = ["nvidia-smi", f"--query-gpu={_CLOCK_FIELDS}", "--format=csv,noheader", f"--id={device.index or 0}"]
    values = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split(",")  # noqa: S603 (fixed)
    named = zip(_CLOCK_FIELDS.split(","), values, strict=True)
    return ", ".join(f"{field} {value.strip()}" for field, value in named)


def describe_processor(device: torch.device) -> str:
    """Return the name of the GPU or CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_field("model name")


def _memory_bytes(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _product_flops(dtype: torch.dtype, device: torch.device) -> float:
    side = _PRODUCT_SIDE[device.type, dtype]
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / _best_seconds(lambda: torch.mm(a, b), device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    seconds = []
    for _ in range(1 + _PEAK_RUNS):
        start = perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(perf_counter() - start)
    return min(seconds[1:])
