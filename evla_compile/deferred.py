"""Weights larger than memory: a tensor that is a recipe, computed where an operator reads it and let go afterwards."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

aten = torch.ops.aten


class DeferredWeight(Tensor):
    """A weight that is not there yet: a source, usually mapped from a file, a dtype, and the part of it that stays.

    It has the shape, dtype and device of its value, and every operator that reads it computes the value, uses it and
    frees it. So a policy of which no cast or cut copy fits into memory can be rewritten, run and exported; one that is
    run over and over should be made of plain tensors, see `materialized`.
    """

    def __new__(cls, source: Tensor, *, dtype: torch.dtype, dim: int = 0, kept: Tensor | None = None) -> Self:
        """Give the value's form to torch; see `__init__`."""
        shape = list(source.shape)
        if kept is not None:
            shape[dim] = kept.numel()
        wrapper: Self = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=source.device)
        return wrapper

    def __init__(self, source: Tensor, *, dtype: torch.dtype, dim: int = 0, kept: Tensor | None = None) -> None:
        """Describe `source` cast to `dtype`, of which the indices `kept` along `dim` stay.

        Args:
            source: the stored tensor; it may be deferred itself.
            dtype: dtype of the value.
            dim: axis that `kept` counts along.
            kept: indices that stay, int64 [K]; None keeps all.
        """
        super().__init__()
        self._source, self._dim, self._kept = source, dim, kept

    def __repr__(self) -> str:  # type: ignore[override]  # it has no contents to show
        return f"DeferredWeight({list(self.shape)}, dtype={self.dtype}, of {list(self._source.shape)})"

    def cut(self, dim: int, kept: Tensor) -> Self:
        """Return the indices `kept` along `dim` of this weight, deferred too."""
        if self._kept is None:  # cut what is stored, then cast: less to cast
            return type(self)(self._source, dtype=self.dtype, dim=dim, kept=kept)
        return type(self)(self, dtype=self.dtype, dim=dim, kept=kept)

    def compute(self) -> Tensor:
        """Return the value as a plain tensor of its own."""
        value = materialized(self._source)
        if self._kept is not None:
            value = value.index_select(self._dim, self._kept.to(value.device))
        return value.to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types its default as a function of no class
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator on the values of its deferred arguments; a mere alias stays deferred."""
        if func in (aten.detach.default, aten.alias.default):
            weight = args[0]
            return cls(weight._source, dtype=weight.dtype, dim=weight._dim, kept=weight._kept)
        plain_args, plain_kwargs = pytree.tree_map_only(cls, cls.compute, (args, dict(kwargs or {})))
        return func(*plain_args, **plain_kwargs)


def cut(weight: Tensor, dim: int, kept: Tensor) -> DeferredWeight:
    """Return the indices `kept` (int64 [K]) along `dim` of `weight` without copying anything yet."""
    if isinstance(weight, DeferredWeight):
        return weight.cut(dim, kept)
    return DeferredWeight(weight, dtype=weight.dtype, dim=dim, kept=kept)


def materialized(weight: Tensor) -> Tensor:
    """Return `weight` as a plain tensor: its value if it is deferred, else itself."""
    return weight.compute() if isinstance(weight, DeferredWeight) else weight
