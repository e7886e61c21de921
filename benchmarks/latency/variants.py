"""Rows on backends, ready to be timed: each is compared with the eager run of its row."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from benchmarks.latency.backends import Backend, TimedCall, make_sampler
from benchmarks.latency.policies import PolicyMaker, PreparedRow
from benchmarks.latency.rows import DtypeName, Row
from benchmarks.latency.timing import Stopwatch
from evla_compile.host.inputs import GraphInputs
from evla_compile.settings.tolerances import TOLERANCES, check

BFLOAT16_TOLERANCE = 5e-2
"""Largest relative error accepted between two ways of computing one bfloat16 graph.

A residual stream of 32 layers is rounded 64 times, by up to 2^-8 each and independently: 3 %, and somewhat more where
relevance is so close that another visual token is kept. A wrong input, weight or order of operations is far beyond it.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Variant:
    """One row on one backend."""

    prepared: PreparedRow
    """The row."""
    backend: Backend
    """The backend."""
    sampler: TimedCall
    """One call of it."""
    error: float | None
    """Relative error against the row's eager run, the worst of the inputs compared; None for that run itself."""
    peak_bytes: int | None
    """Peak of weights and other GPU memory; None on a CPU."""


def prepare_row(
    row: Row,
    maker: PolicyMaker,
    backends: Sequence[Backend],
    inputs: Sequence[GraphInputs],
    *,
    compile_mode: str,
    threads: int,
    folder: Path,
) -> Iterator[Variant]:
    """Prepare a row, and yield it on each backend in turn; upstream's policy is always eager.

    Args:
        row: the row.
        maker: what makes it.
        backends: backends wanted.
        inputs: inputs for the comparison of backends, two at least: with one, a backend that always returns the
            recorded result would pass.
        compile_mode: Inductor's mode.
        threads: threads of ONNX Runtime on a CPU.
        folder: an empty folder for what a backend needs on disk.

    Raises:
        VerificationError: a backend returns something else than the eager run.
        EvlaError: a backend cannot run the row.
    """
    prepared, device = maker.make(row), maker.device
    make = partial(
        make_sampler, prepared=prepared, device=device, compile_mode=compile_mode, threads=threads, folder=folder
    )
    reference = make("eager")
    expected = [reference(given, Stopwatch(device)) for given in inputs]
    for backend in backends if row.config is not None else ("eager",):
        allocated_before = _allocated(device)
        sampler = reference if backend == "eager" else make(backend)
        sampler(inputs[0], Stopwatch(device))  # the first call may compile
        if not backend.endswith("cudagraphs"):  # these keep the memory of their recording
            _allocated(device)
        errors = [
            check(
                f"{row.label} on {backend}, samples against its eager run",
                sampler(given, Stopwatch(device)),
                right,
                tolerance=tolerance(row.dtype),
            )
            for given, right in zip(inputs, expected, strict=True)
        ]
        yield Variant(
            prepared=prepared,
            backend=backend,
            sampler=sampler,
            error=None if backend == "eager" else max(errors),
            peak_bytes=prepared.weight_bytes + torch.cuda.max_memory_allocated(device) - allocated_before
            if device.type == "cuda"
            else None,
        )


def tolerance(dtype: DtypeName) -> float:
    """Return the relative error that samples may have against the eager run of the same graph."""
    return BFLOAT16_TOLERANCE if dtype == "bfloat16" else TOLERANCES.lowered


def _allocated(device: torch.device) -> int:
    """Reset the peak of a GPU's memory, and return the bytes allocated now; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)
