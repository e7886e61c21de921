"""Weighted ridge regression in float64, over rows that come in batches.

Shape legend: N rows, K features, D outputs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from evla_compile.errors import CalibrationError

_BLOCK = 512
"""Rows of a weight that are converted to float64 at once: whole, those of a 7-billion-parameter decoder take 0.3 GB."""


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x W^T [...,D] of x [...,K] in float64 and W [D,K] in any dtype, which is never float64 as a whole."""
    return torch.cat([functional.linear(x, part.double()) for part in torch.split(weight, _BLOCK)], dim=-1)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class RidgeSolution:
    """The M [D,K] and b [D] that a regression found, float64; M is held as factors."""

    factor: Tensor
    """[R,D]; M is its transpose times `rows`, over `scale`."""
    rows: Tensor | None
    """[R,K]; None for the identity, K is R then."""
    scale: Tensor
    """What every feature was divided by, [K]."""
    bias: Tensor
    """b [D]."""

    def change(self) -> Tensor:
        """Return M [D,K], whole."""
        return torch.cat([part for _, part in self._parts(slice(None))])

    def added_to(self, weight: Tensor, first: int = 0) -> Tensor:
        """Return W + M in the dtype of W.

        Args:
            weight: W [D,C].
            first: the feature that its first column is for; those before it, and those behind its last, are left out.
        """
        found = torch.empty_like(weight)
        for rows, part in self._parts(slice(first, first + weight.shape[1])):
            found[rows] = weight[rows].double() + part
        return found

    def _parts(self, columns: slice) -> Iterator[tuple[slice, Tensor]]:
        """Yield some columns of M, rows by rows."""
        for begin in range(0, self.factor.shape[1], _BLOCK):
            rows = slice(begin, begin + _BLOCK)
            part = self.factor[:, rows].T  # [D,R]
            yield rows, (part[:, columns] if self.rows is None else part @ self.rows[:, columns]) / self.scale[columns]


class RidgeRegression:
    """Finds M [D,K] and b [D] that minimise sum_n w_n |y_n - M x_n - b|^2 + lambda |M|^2.

    b takes no penalty: weighted means are removed from x and y first. lambda is rho times the mean diagonal of the
    weighted, centred Gram matrix, so that rho has no units. Where there are fewer rows than features, the dual form is
    solved, with a matrix [N,N] in place of [K,K]; both give the same M.
    """

    def __init__(self, features: int, outputs: int, rows: int, device: torch.device) -> None:
        """Prepare for at most `rows` rows.

        Args:
            features: K.
            outputs: D.
            rows: N, or more.
            device: where to compute.
        """
        self._dual = rows < features
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self._rows = 0

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self._squares = zeros(features)
        if not self._dual:
            self._gram, self._cross, self._mean_x = zeros(features, features), zeros(features, outputs), zeros(features)
            self._mean_y, self._weight = zeros(outputs), zeros()

    def add(self, x: Tensor, y: Tensor, weights: Tensor) -> None:
        """Add rows x [N,K] and y [N,D] with weights [N], float64."""
        self._rows += len(x)
        self._squares += x.square().sum(0)
        if self._dual:
            self._parts.append((x, y, weights))
            return
        weighted = weights[:, None] * x  # [N,K]
        self._gram += weighted.T @ x
        self._cross += weighted.T @ y
        self._mean_x += weighted.sum(0)
        self._mean_y += weights @ y
        self._weight += weights.sum()

    def solve(self, rho: float, blocks: Sequence[int] = ()) -> RidgeSolution:
        """Return M and b.

        Args:
            rho: strength of the penalty, above 0.
            blocks: sizes of groups of features, each of which is divided by its root mean square over the rows before
                the penalty is applied, so that it does not depend on their units; empty for no such scaling.

        Raises:
            CalibrationError: the rows have no weight, or values that are not finite.
        """
        scale = self._scale(blocks)  # [K]
        if self._dual:
            found = self._solve_dual(rho, scale)
        else:
            mean_x, mean_y = self._mean_x / self._weight / scale, self._mean_y / self._weight
            gram = self._gram / scale / scale[:, None] - self._weight * torch.outer(mean_x, mean_x)  # [K,K]
            cross = self._cross / scale[:, None] - self._weight * torch.outer(mean_x, mean_y)  # [K,D]
            factor = _solve(gram, rho * gram.diagonal().mean(), cross)  # [K,D]
            found = RidgeSolution(factor=factor, rows=None, scale=scale, bias=mean_y - mean_x @ factor)
        if not (found.factor.isfinite().all() and found.bias.isfinite().all()):
            raise CalibrationError(
                "the least squares of a repair have no finite solution: the activations on the calibration frames are"
                " constant or not finite; give other frames, or repair='none'"
            )
        return found

    def _scale(self, blocks: Sequence[int]) -> Tensor:
        """Return what every feature is divided by, [K]."""
        if not blocks:
            return torch.ones_like(self._squares)
        sizes = torch.tensor(blocks, device=self._squares.device)
        parts = torch.split(self._squares, list(blocks))
        means = torch.stack([part.mean() / max(1, self._rows) for part in parts]).sqrt()
        return means.clamp_min(torch.finfo(torch.float64).tiny).repeat_interleave(sizes)

    def _solve_dual(self, rho: float, scale: Tensor) -> RidgeSolution:
        """Return the solution from a matrix [N,N]."""
        x, y, weights = (torch.cat(part) for part in zip(*self._parts, strict=True))
        mean_x, mean_y = weights @ (x / scale) / weights.sum(), weights @ y / weights.sum()
        root = weights.sqrt()[:, None]  # [N,1]
        x, y = root * (x / scale - mean_x), root * (y - mean_y)
        kernel = x @ x.T  # [N,N]
        penalty = rho * kernel.diagonal().sum() / x.shape[1]  # its trace is that of the Gram matrix
        factor = _solve(kernel, penalty, y)  # [N,D]
        return RidgeSolution(factor=factor, rows=x, scale=scale, bias=mean_y - (x @ mean_x) @ factor)


def _solve(matrix: Tensor, penalty: Tensor, right: Tensor) -> Tensor:
    """Return (matrix + penalty I)^-1 right, of a symmetric matrix that is positive semidefinite; NaN if singular."""
    matrix.diagonal().add_(penalty)
    factor, failed = torch.linalg.cholesky_ex(matrix)
    return torch.cholesky_solve(right, factor) if not failed else torch.full_like(right, torch.nan)
