"""The table of precisions against what torch and ONNX Runtime say of the dtypes."""

import numpy as np
import pytest
import torch

from evla_compile.settings.precision import LOWER_PRECISIONS, PRECISION_ROWS, PRECISIONS, Precision


def test_every_precision_has_a_row() -> None:
    assert tuple(PRECISION_ROWS) == PRECISIONS == ("float32", *LOWER_PRECISIONS)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_row_agrees_with_its_dtype(precision: Precision) -> None:
    row, dtype = PRECISION_ROWS[precision], getattr(torch, precision)
    assert row.bytes == dtype.itemsize
    largest = torch.finfo(dtype).max
    assert row.limit == (largest / 2 if largest < 1e38 else None)


def test_values_up_to_the_limit_stay_finite_when_doubled() -> None:
    limit = PRECISION_ROWS["float16"].limit
    assert limit is not None
    assert np.isfinite(np.float16(2 * limit))
