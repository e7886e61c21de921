"""The measure of deviation, and the check that raises."""

from dataclasses import FrozenInstanceError, asdict

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.errors import VerificationError
from evla_compile.settings.precision import PRECISION_ROWS, Precision
from evla_compile.settings.tolerances import TOLERANCES, check, check_stages, lowered_tolerance, relative_error

REFERENCE = np.array([[2.0, -8.0], [0.0, 1.0]], np.float32)


def test_the_error_is_relative_to_the_largest_value_of_the_reference() -> None:
    actual = REFERENCE + np.array([[0.0, 0.1], [-0.4, 0.0]], np.float32)
    assert relative_error(actual, REFERENCE) == pytest.approx(0.4 / 8.0)
    assert relative_error(REFERENCE, REFERENCE) == 0.0


def test_a_reference_of_zeros_is_measured_absolutely() -> None:
    assert relative_error(np.full(3, 0.25), np.zeros(3)) == 0.25


def test_differences_of_large_float32_values_are_not_rounded_away() -> None:
    reference = np.array([3e38, -3e38], np.float32)
    assert relative_error(-reference, reference) == pytest.approx(2.0)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (1, 2, 2)])
def test_shapes_are_never_broadcast(shape: tuple[int, ...]) -> None:
    with pytest.raises(VerificationError, match=r"has the shape \[.*\], the reference \[2, 2\]"):
        relative_error(np.zeros(shape), REFERENCE)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("side", "whose"), [(0, "its"), (1, "the reference's")])
def test_values_that_are_not_finite_are_refused_on_either_side(value: float, side: int, whose: str) -> None:
    arrays: list[NDArray[np.generic]] = [REFERENCE, REFERENCE]
    arrays[side] = np.where(REFERENCE == 1.0, value, REFERENCE)
    with pytest.raises(VerificationError, match=f"compared: 1 of {whose} 4 values are infinite or not a number"):
        relative_error(*arrays)
    with pytest.raises(VerificationError, match="samples cannot be compared"):
        check("samples", *arrays, tolerance=1.0)


def test_no_values_are_no_agreement() -> None:
    with pytest.raises(VerificationError, match="the reference has no values"):
        relative_error(np.zeros((0, 2)), np.zeros((0, 2)))
    with pytest.raises(VerificationError, match="this policy: nothing was compared, so nothing is proven"):
        check_stages("this policy", {}, "float32")


def test_a_check_returns_the_error_up_to_the_tolerance_and_raises_beyond() -> None:
    actual = REFERENCE + np.float32(0.5)
    assert check("samples", actual, REFERENCE, tolerance=0.0625) == 0.0625
    with pytest.raises(VerificationError, match=r"samples: relative error 6\.25e-02 exceeds the tolerance 6e-02"):
        check("samples", actual, REFERENCE, tolerance=0.06)


def test_the_table_cannot_be_loosened() -> None:
    with pytest.raises(FrozenInstanceError):
        TOLERANCES.samples = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("precision", "stage", "expected"),
    [
        ("float32", "layers.3", 1e-4),
        ("float32", "denoising.0", 1e-4),
        ("float32", "samples", 1e-4),
        ("bfloat16", "layers.3", 1e-1),
        ("bfloat16", "cognition", 1e-1),
        ("bfloat16", "denoising.0", 3e-2),
        ("bfloat16", "samples", 3e-2),
        ("float16", "layers.3", 1e-2),
        ("float16", "cognition", 1e-2),
        ("float16", "denoising.0", 5e-3),
        ("float16", "samples", 5e-3),
    ],
)
def test_every_stage_has_the_tolerance_of_its_precision_and_side(
    precision: Precision, stage: str, expected: float
) -> None:
    assert lowered_tolerance(precision, stage) == expected
    check_stages("it", {stage: expected}, precision)
    with pytest.raises(VerificationError, match=f"it: {stage} is .* tolerance {expected:.0e}; .*the first that is com"):
        check_stages("it", {stage: expected * 1.001}, precision)


def test_no_tolerance_is_so_wide_that_nothing_could_fail_it() -> None:
    for name, tolerance in asdict(TOLERANCES).items():
        assert 0 < tolerance <= 1e-3, name
    for precision, row in PRECISION_ROWS.items():
        assert 0 < row.actions <= row.features <= 0.1, precision


def test_the_first_stage_that_leaves_its_tolerance_is_named_with_the_one_before() -> None:
    errors = {"patches": 1e-6, "layers.0": 2e-4, "layers.1": 0.5, "samples": 1e-6}
    with pytest.raises(VerificationError, match=r"it: layers\.0 is 2\.00e-04 .* behind patches, which is within it"):
        check_stages("it", errors, "float32")
    check_stages("it", {"patches": 1e-6, "samples": 1e-6}, "float32")
