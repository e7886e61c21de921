"""The table of all tolerances, and the relative error that they apply to; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evla_compile.errors import VerificationError
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.precision import PRECISION_ROWS, Precision


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerances:
    """Largest relative errors that are accepted (see `relative_error`), float32 on a CPU."""

    patches: float = 1e-5
    """Vision features against CogACT's public code."""
    projected: float = 1e-5
    """Projected patches against CogACT's public code."""
    cognition: float = 1e-5
    """Cognition feature against CogACT's public code."""
    importance: float = 1e-5
    """Layer importance against an eager reference."""
    trajectory: float = 1e-4
    """Denoising trajectory against CogACT's public code."""
    samples: float = 1e-4
    """Raw samples against CogACT's public code or an eager reference."""
    actions: float = 1e-4
    """Un-normalised actions against CogACT's public code."""
    lowered: float = PRECISION_ROWS["float32"].actions
    """A lowered graph in float32 against the graph that was lowered; in less, see `lowered_tolerance`."""
    second_consumer: float = 1e-3
    """The graph in a second, independent runtime, which was not used during development."""


TOLERANCES = Tolerances()


def lowered_tolerance(precision: Precision, stage: str) -> float:
    """Return how far a stage of a graph lowered to `precision` may be from the float32 graph."""
    row = PRECISION_ROWS[precision]
    return row.actions if COGACT.tolerance_of(stage) == "actions" else row.features


def check_stages(what: str, errors: Mapping[str, float], precision: Precision) -> None:
    """Refuse errors above the tolerance of a precision.

    Args:
        what: what was compared.
        errors: relative error by stage, in data-flow order.
        precision: that of the lowered graph.

    Raises:
        VerificationError: the message names the first stage that exceeds it, and what was before; or nothing was
            compared.
    """
    if not errors:
        raise VerificationError(f"{what}: nothing was compared, so nothing is proven: do not deploy it")
    before: str | None = None
    for stage, error in errors.items():
        tolerance = lowered_tolerance(precision, stage)
        if not error <= tolerance:
            passed = f"behind {before}, which is within it" if before else "the first that is compared"
            raise VerificationError(
                f"{what}: {stage} is {error:.2e} of its largest value from the float32 graph, tolerance"
                f" {tolerance:.0e}; it is the first stage to leave it, {passed}: do not deploy it"
            )
        before = stage


def relative_error(actual: NDArray[np.generic], reference: NDArray[np.generic]) -> float:
    """Return the largest absolute difference over the largest absolute value of `reference`.

    A reference of zeros is measured absolutely.

    Raises:
        VerificationError: the shapes differ, there are no values, or one of them is not finite.
    """
    if actual.shape != reference.shape:
        raise VerificationError(f"has the shape {list(actual.shape)}, the reference {list(reference.shape)}")
    if not reference.size:
        raise VerificationError("cannot be compared: the reference has no values")
    found, expected = actual.astype(np.float64), reference.astype(np.float64)
    for whose, values in (("its", found), ("the reference's", expected)):
        wrong = int(np.count_nonzero(~np.isfinite(values)))
        if wrong:
            raise VerificationError(
                f"cannot be compared: {wrong} of {whose} {values.size} values are infinite or not a number"
            )
    largest = float(np.abs(expected).max(initial=0.0))
    return float(np.abs(found - expected).max(initial=0.0)) / (largest or 1.0)


def check(stage: str, actual: NDArray[np.generic], reference: NDArray[np.generic], *, tolerance: float) -> float:
    """Return the relative error of a stage, or raise where it exceeds the tolerance.

    Raises:
        VerificationError: the error exceeds `tolerance`, or the arrays cannot be compared; the message names the stage.
    """
    try:
        error = relative_error(actual, reference)
    except VerificationError as reason:
        raise VerificationError(f"{stage} {reason}") from reason
    if not error <= tolerance:
        raise VerificationError(f"{stage}: relative error {error:.2e} exceeds the tolerance {tolerance:.0e}")
    return error
