"""Ridge regression against numpy's least squares on the augmented system."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from evla_compile.calibration import ridge
from evla_compile.calibration.ridge import RidgeRegression, linear
from evla_compile.errors import CalibrationError

CPU = torch.device("cpu")


def rows(count: int, features: int, outputs: int) -> tuple[Tensor, Tensor, Tensor]:
    draw = np.random.Generator(np.random.PCG64(0))
    x = draw.normal(3.0, 2.0, (count, features))
    y = x @ draw.normal(size=(features, outputs)) + draw.normal(size=(count, outputs)) + 5.0
    return torch.from_numpy(x), torch.from_numpy(y), torch.from_numpy(draw.uniform(0.1, 20.0, count))


def by_hand(
    x: Tensor, y: Tensor, weights: Tensor, rho: float, blocks: tuple[int, ...] = ()
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Solve [sqrt(w) x; sqrt(lambda) I] M^T = [sqrt(w) y; 0] by `numpy.linalg.lstsq`, weighted means removed."""
    features, b, w = (part.numpy() for part in (x, y, weights))
    scale = np.ones(features.shape[1])
    start = 0
    for size in blocks:
        scale[start : start + size] = np.sqrt(np.mean(features[:, start : start + size] ** 2))
        start += size
    features = features / scale
    mean_x, mean_y = np.average(features, axis=0, weights=w), np.average(b, axis=0, weights=w)
    a = np.sqrt(w)[:, None] * (features - mean_x)
    b = np.sqrt(w)[:, None] * (b - mean_y)
    penalty = rho * np.mean(np.sum(a**2, axis=0))
    a = np.vstack([a, np.sqrt(penalty) * np.eye(a.shape[1])])
    b = np.vstack([b, np.zeros((len(scale), b.shape[1]))])
    found = np.linalg.lstsq(a, b, rcond=None)[0].T
    return found / scale, mean_y - found @ mean_x


@pytest.mark.parametrize("count", [40, 9], ids=["more rows than features", "fewer rows than features"])
@pytest.mark.parametrize("blocks", [(), (4, 8)])
@pytest.mark.parametrize("rho", [1e-4, 0.1, 10.0])
def test_it_equals_least_squares_on_the_augmented_system(count: int, blocks: tuple[int, ...], rho: float) -> None:
    x, y, weights = rows(count, 12, 5)
    regression = RidgeRegression(12, 5, count, CPU)
    for first in range(0, count, 7):
        regression.add(*(part[first : first + 7] for part in (x, y, weights)))
    found = regression.solve(rho, blocks)
    expected, offset = by_hand(x, y, weights, rho, blocks)
    np.testing.assert_allclose(found.change().numpy(), expected, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(found.bias.numpy(), offset, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("count", [40, 9], ids=["more rows than features", "fewer rows than features"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_weight_gets_its_columns_of_the_change_in_its_own_dtype(
    count: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ridge, "_BLOCK", 2)  # the last of the five rows are a block of their own
    x, y, weights = rows(count, 12, 5)
    regression = RidgeRegression(12, 5, count, CPU)
    regression.add(x, y, weights)
    found = regression.solve(0.1, (4, 8))
    weight = torch.from_numpy(np.random.Generator(np.random.PCG64(1)).normal(size=(5, 8))).to(dtype)
    expected = (weight.double() + found.change()[:, 4:]).to(dtype)
    torch.testing.assert_close(found.added_to(weight, 4), expected, rtol=1e-12, atol=1e-12)
    first = (weight.double() + found.change()[:, :8]).to(dtype)
    torch.testing.assert_close(found.added_to(weight), first, rtol=1e-12, atol=1e-12)


def test_a_product_in_blocks_is_the_product(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ridge, "_BLOCK", 2)
    x, y, _ = rows(9, 12, 5)
    weight = (y.T @ x).to(torch.bfloat16)  # [5,12]
    torch.testing.assert_close(linear(x, weight), x @ weight.double().T, rtol=1e-12, atol=1e-12)


def test_both_forms_agree() -> None:
    x, y, weights = rows(12, 12, 5)
    results = []
    for announced in (12, 11):  # as many rows as features is the primal form
        regression = RidgeRegression(12, 5, announced, CPU)
        regression.add(x, y, weights)
        results.append(regression.solve(0.01))
    primal, dual = results
    torch.testing.assert_close(primal.change(), dual.change(), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(primal.bias, dual.bias, rtol=1e-8, atol=1e-10)


def test_a_large_penalty_leaves_the_bias_alone() -> None:
    x, y, weights = rows(40, 12, 5)
    regression = RidgeRegression(12, 5, 40, CPU)
    regression.add(x, y, weights)
    found = regression.solve(1e12)
    assert found.change().abs().max() < 1e-9
    torch.testing.assert_close(found.bias, (weights @ y) / weights.sum())


def test_rows_without_a_solution_are_refused() -> None:
    x, y, weights = rows(40, 12, 5)
    regression = RidgeRegression(12, 5, 40, CPU)
    regression.add(x, torch.full_like(y, torch.nan), weights)
    with pytest.raises(CalibrationError, match="no finite solution"):
        regression.solve(0.1)
