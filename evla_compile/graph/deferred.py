"""Deferred (lazy) weights, computed when an operator reads them, then freed: for policies larger than memory."""

from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

aten = torch.ops.aten


@dataclass(slots=True)
class _Computation:
    """How the value of a deferred weight is computed; its aliases share one, so a written value reaches all of them."""

    source: Tensor
    dtype: torch.dtype
    dim: int
    kept: Tensor | None

    def compute(self) -> Tensor:
        value = materialized(self.source)
        if self.kept is not None:
            value = value.index_select(self.dim, self.kept.to(value.device))
        return value.to(self.dtype)


class DeferredWeight(Tensor):
    """A deferred (lazy) weight: computed when it is read, then freed.

    Its value is a source tensor, mostly mapped from a file, cast to a dtype, with only some indices along one axis kept
    if so wanted. It has the shape, dtype and device of its value, and every operator that reads it computes the value,
    uses it and frees it. So a policy can be rewritten, run and exported although no cast or sliced copy of it fits into
    memory. Where a policy runs many times, plain tensors are faster, see `materialized`.

    An operator that writes into the whole weight (`copy_`, `add_`, `load_state_dict`) replaces the source by the value
    written, in memory; the source tensor itself does not change. Writing into a view of the weight is a TypeError.
    """

    def __new__(cls, source: Tensor, *, dtype: torch.dtype, dim: int = 0, kept: Tensor | None = None) -> Self:
        """Tell torch the shape, dtype and device of the value; see `__init__`."""
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
        self._computation = _Computation(source, dtype, dim, kept)

    def __repr__(self) -> str:  # type: ignore[override]  # it has no contents to show
        return f"{type(self).__name__}({list(self.shape)}, dtype={self.dtype})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        computation = self._computation
        # A written value has the weight's dtype and belongs to it alone; any other source is never written into.
        own = computation.kept is None and computation.source.dtype == computation.dtype
        source = deepcopy(computation.source, memo) if own else computation.source
        copied = DeferredWeight(source, dtype=computation.dtype, dim=computation.dim, kept=computation.kept)
        memo[id(self)] = result = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return result

    def cut(self, dim: int, kept: Tensor) -> "DeferredWeight":
        """Return the indices `kept` along `dim` of this weight, deferred too."""
        if self._computation.kept is None:  # cut what is stored, then cast: less to cast
            return DeferredWeight(self._computation.source, dtype=self.dtype, dim=dim, kept=kept)
        return DeferredWeight(self, dtype=self.dtype, dim=dim, kept=kept)

    def compute(self) -> Tensor:
        """Return the value as a new plain tensor."""
        return self._computation.compute()

    def extremes(self) -> tuple[Tensor, Tensor]:
        """Return the least and the greatest value, NaN if a value is; a cast keeps the order, so it is not computed."""
        computation = self._computation
        if computation.kept is not None:
            low, high = torch.aminmax(self.compute())
        elif isinstance(computation.source, DeferredWeight):
            low, high = computation.source.extremes()
        else:
            low, high = torch.aminmax(computation.source)
        return low.to(computation.dtype), high.to(computation.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types its default as a function of no class
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operator on the values of its deferred arguments; aliases and views stay deferred."""
        given = dict(kwargs or {})
        if func in (aten.detach.default, aten.alias.default) and type(args[0]) is DeferredWeight:
            return _alias(args[0])
        if _returns_views(func) and isinstance(args[0], DeferredWeight):
            return _views(args[0], func, args[1:], given)
        written = _written(func, args, given)
        values = {id(weight): weight.compute() for weight in written}
        plain_args, plain_kwargs = pytree.tree_map_only(
            DeferredWeight,
            lambda weight: values[id(weight)] if id(weight) in values else weight.compute(),
            (args, given),
        )
        result = func(*plain_args, **plain_kwargs)
        for weight in written:
            weight._computation.source, weight._computation.kept = values[id(weight)], None
        owners = {id(values[id(weight)]): weight for weight in written}
        return pytree.tree_map_only(Tensor, lambda value: owners.get(id(value), value), result) if written else result


class _View(DeferredWeight):
    """A view of a deferred weight, computed when it is read; it cannot be written into."""

    def __new__(cls, base: DeferredWeight, form: Tensor, view: Callable[[Tensor], Tensor]) -> Self:
        wrapper: Self = torch.Tensor._make_wrapper_subclass(
            cls, form.shape, strides=form.stride(), dtype=form.dtype, device=base.device
        )
        return wrapper

    def __init__(self, base: DeferredWeight, form: Tensor, view: Callable[[Tensor], Tensor]) -> None:
        """Describe the view of `base`, of the shape, strides and dtype of `form`, that `view` takes of its value."""
        Tensor.__init__(self)
        self._base_weight, self._view = base, view

    def cut(self, dim: int, kept: Tensor) -> DeferredWeight:
        return DeferredWeight(self, dtype=self.dtype, dim=dim, kept=kept)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.compute().clone()

    def extremes(self) -> tuple[Tensor, Tensor]:
        low, high = torch.aminmax(self.compute())
        return low, high

    def compute(self) -> Tensor:
        return self._view(self._base_weight.compute())


_UNMARKED_VIEWS = frozenset(
    {
        *(aten._unsafe_view.default, aten.unsafe_chunk.default),
        *(aten.unsafe_split.Tensor, aten.unsafe_split_with_sizes.default),
    }
)
"""Operators that return views of their first argument although their schemas do not say so."""


def _returns_views(func: Any) -> bool:
    """Return whether an operator returns views of its first argument, one or a list, by its schema."""
    returned = [value.alias_info for value in func._schema.returns]
    return func in _UNMARKED_VIEWS or any(alias is not None and not alias.is_write for alias in returned)


def _views(base: DeferredWeight, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """Return what an operator that returns views returns of a deferred weight, each tensor deferred."""
    # In inference mode torch hands on `to` or `reshape`, which may copy, instead of the operators that they consist of.
    parts = func.decompose(base, *args, **kwargs)
    if parts is not NotImplemented:
        return parts

    def view_of(value: Tensor, number: int | None = None) -> Any:
        views = func(value, *args, **kwargs)
        return views if number is None else views[number]

    form = view_of(torch.empty_strided(base.shape, base.stride(), dtype=base.dtype, device="meta"))
    if isinstance(form, Tensor):
        return _View(base, form, view_of)
    return [_View(base, part, partial(view_of, number=number)) for number, part in enumerate(form)]


def _alias(weight: DeferredWeight) -> DeferredWeight:
    computation = weight._computation
    alias = DeferredWeight(computation.source, dtype=computation.dtype, dim=computation.dim, kept=computation.kept)
    alias._computation = computation
    return alias


def _written(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[DeferredWeight]:
    """Return the deferred weights that an operator writes into.

    Raises:
        TypeError: one of them is a view.
    """
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)}
    named |= kwargs
    writes = {argument.name for argument in func._schema.arguments if argument.is_write}
    leaves = pytree.tree_leaves([value for name, value in named.items() if name in writes])
    written = [leaf for leaf in leaves if isinstance(leaf, DeferredWeight)]
    if any(isinstance(weight, _View) for weight in written):
        raise TypeError(
            f"{func} writes into a view of a deferred weight, whose value is computed anew at every read: write into"
            " the whole weight, as in weight.copy_(changed), or load the policy without deferred=True"
        )
    return written


def cut(weight: Tensor, dim: int, kept: Tensor) -> DeferredWeight:
    """Return the indices `kept` (int64 [K]) along `dim` of `weight` without copying anything yet."""
    if isinstance(weight, DeferredWeight):
        return weight.cut(dim, kept)
    return DeferredWeight(weight, dtype=weight.dtype, dim=dim, kept=kept)


def values_at(weight: Tensor, positions: Tensor) -> Tensor:
    """Return the values of a weight at flat, row-major positions (int64 [K]), casting these alone where it can."""
    if type(weight) is DeferredWeight and weight._computation.kept is None:
        return values_at(weight._computation.source, positions).to(weight.dtype)
    value = materialized(weight)
    return value[torch.unravel_index(positions.to(value.device), value.shape)].reshape(-1)


def materialized(weight: Tensor) -> Tensor:
    """Return `weight` as a plain tensor: its value if it is deferred, else itself."""
    return weight.compute() if isinstance(weight, DeferredWeight) else weight
