"""Compare anything that runs a policy with recorded cases, for exports and `verify` alike; no torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from evla_compile.artifact.cases import RecordedCase, probe
from evla_compile.errors import VerificationError
from evla_compile.host.inputs import GraphInputs
from evla_compile.settings.precision import Precision
from evla_compile.settings.tolerances import check_stages, relative_error

Run: TypeAlias = Callable[[GraphInputs], Mapping[str, NDArray[Any]]]
"""A graph's inputs -> outputs and stages by name, as whole arrays."""


def replay(
    what: str, run: Run, cases: Sequence[RecordedCase], *, precision: Precision, text_tokens: int
) -> dict[str, float]:
    """Run recorded cases and return the error of each stage and output against the recorded values, the worst case.

    Args:
        what: name of what runs, for messages.
        run: runs it.
        cases: recorded cases; all their values are compared.
        precision: that of the policy, which decides the tolerances.
        text_tokens: T, the text budget.

    Returns:
        Relative error by stage, in data-flow order.

    Raises:
        VerificationError: a stage leaves the tolerance of `precision`, cannot be compared or is not there; the message
            names the first. Or there was nothing to compare.
    """
    worst: dict[str, float] = {}
    for case in cases:
        try:
            errors = stage_errors(case, run(case.inputs), text_tokens)
        except VerificationError as error:
            raise VerificationError(f"{what}: {error}: do not deploy it") from error
        worst |= {name: max(worst.get(name, 0.0), error) for name, error in errors.items()}
    check_stages(what, worst, precision)
    return worst


def stage_errors(case: RecordedCase, found: Mapping[str, NDArray[Any]], text_tokens: int) -> dict[str, float]:
    """Return the error of each stage and output against the recorded values, in data-flow order.

    Floating-point values are measured by `relative_error`; whole numbers, which are indices of patches, by the share of
    those expected that are not among those found.

    Args:
        case: what was recorded.
        found: values by name, as whole arrays; those that were not recorded are ignored.
        text_tokens: T, the text budget.

    Raises:
        VerificationError: a recorded value is not there, has another shape, or is not finite; the message names it.
    """
    errors = {}
    for name, expected in (*case.stages.items(), *case.outputs.items()):
        if name not in found:
            raise VerificationError(f"{name} was recorded, and no value has this name: found {', '.join(found)}")
        value = probe(name, found[name], text_tokens) if name in case.stages else found[name]
        measure = _missing_share if expected.dtype.kind == "i" else relative_error
        try:
            errors[name] = measure(value, expected)
        except VerificationError as error:
            raise VerificationError(f"{name} {error}") from error
    return errors


def _missing_share(found: NDArray[Any], expected: NDArray[Any]) -> float:
    if found.shape != expected.shape:
        raise VerificationError(f"has the shape {list(found.shape)}, the reference {list(expected.shape)}")
    rows = zip(found.reshape(len(found), -1), expected.reshape(len(expected), -1), strict=True)
    return max(1.0 - float(np.isin(wanted, row).mean()) for row, wanted in rows)
