"""Compute the large matrix products in half precision, between explicit casts."""

import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, get_tensor, replace_tensor
from evla_compile.graph.deferred import DeferredWeight
from evla_compile.graph.sites import argument, is_call, module_path
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.precision import LOWER_PRECISIONS, PRECISION_ROWS, LowerPrecisionName

aten = torch.ops.aten

_OPERANDS: Mapping[object, tuple[int, ...]] = {
    aten.linear.default: (0, 1, 2),
    aten.scaled_dot_product_attention.default: (0, 1, 2, 3),
    aten.embedding.default: (0,),
}
"""Operators that are lowered, with the positions of their tensors that take the lower dtype."""

_VIEWS = (
    aten.expand.default,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.reshape.default,
    aten.slice.Tensor,
    aten.transpose.int,
    aten.unbind.int,
    aten.unsqueeze.default,
    aten.view.default,
)
"""Operators that rearrange values and compute none."""


@dataclass(frozen=True, kw_only=True)
class LowerPrecision(GraphPass):
    """Compute linear layers and attention of vision, projector and decoder in `dtype`, lossy.

    Their weights and the token embedding are stored in it. Everything else stays float32: the patch embeddings (ONNX
    has bfloat16 convolutions from opset 22 on only), the residual stream, norms, activations, rotary tables, the scores
    and distances that select visual tokens, the cognition feature, the action head and the sampler. A strongly typed
    TensorRT network keeps these casts where they are.

    An operand of a lowered operator takes the lower dtype in one of four ways:

    1. a weight that only lowered operators read is stored in the lower dtype;
    2. a value that is the result of a lowered operator is read before its cast back to float32;
    3. a view, slice or transposition of such a result is repeated in the lower dtype;
    4. anything else is cast in front of the operator.

    float16 overflows at 65504: it is refused unless `ranges` shows that every lowered layer stays below half of that.
    Refuses a graph without such a layer, and one that is not float32.
    """

    exact: ClassVar[bool] = False

    dtype: LowerPrecisionName
    """Dtype of the products' factors and results; they are summed in float32 by every backend."""
    ranges: tuple[tuple[str, float], ...] = ()
    """Largest absolute input or output observed in each layer, by module path; needed for float16."""

    def __post_init__(self) -> None:
        if self.dtype not in LOWER_PRECISIONS:
            raise ValueError(f"dtype={self.dtype!r}: expected {' or '.join(LOWER_PRECISIONS)}")

    def __repr__(self) -> str:
        return f"LowerPrecision(dtype={self.dtype!r})"  # the ranges would fill pages

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Cast the operands of every lowered operator, and its result back."""
        sites = list(lowered_sites(gm.graph))
        if not sites:
            raise PassError(f"nothing to lower: no linear layer or attention under {', '.join(COGACT.lowered)}")
        limit = PRECISION_ROWS[self.dtype].limit
        if limit is not None:
            check_ranges(sites, dict(self.ranges), self.dtype, limit)
        return _Lowering(gm, getattr(torch, self.dtype)).lower(sites)


def lowered_sites(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the operators that are lowered, in graph order."""
    for node in graph.nodes:
        if is_call(node, *_OPERANDS) and module_path(node).split(".")[0] in COGACT.lowered:
            yield node


def float_operands(node: fx.Node) -> list[fx.Node]:
    """Return what a lowered operator reads as floating-point tensors, weights included."""
    read = [node.args[index] for index in _OPERANDS.get(node.target, ()) if index < len(node.args)]
    return [value for value in read if isinstance(value, fx.Node)]


def check_ranges(sites: Iterable[fx.Node], ranges: dict[str, float], dtype: LowerPrecisionName, limit: float) -> None:
    """Refuse float16 for layers whose observed values exceed its limit, or whose values were not observed.

    Raises:
        PassError: the message names the layer that exceeds the limit most, or those that were not observed.
    """
    names = [module_path(node) for node in sites if node.target is not aten.embedding.default]
    unknown = sorted({name for name in names if name not in ranges})
    if unknown:
        raise PassError(
            f"{dtype}: {len(unknown)} layers, {unknown[0]} among them, were not observed in calibration, so nothing is"
            " known of their range: calibrate the policy on real frames and compile with that plan, or choose bfloat16"
        )
    worst = max(names, key=lambda name: math.inf if math.isnan(ranges[name]) else ranges[name])
    if not ranges[worst] <= limit:
        beyond = sum(not ranges[name] <= limit for name in set(names))
        raise PassError(
            f"{dtype} cannot hold {worst}, where calibration observed {ranges[worst]:.4g} (limit {limit:.0f},"
            f" half of {dtype}'s largest; {beyond} such layers): choose bfloat16"
        )


class _Lowering:
    """Lowers one graph; knows which float32 values are casts of lower ones, so that none is cast back and forth.

    The numbers in its comments are the cases in the docstring of `LowerPrecision`.
    """

    def __init__(self, gm: fx.GraphModule, dtype: torch.dtype) -> None:
        self._gm, self._dtype = gm, dtype
        self._lower_of: dict[fx.Node, fx.Node] = {}  # by a node whose value is float32, the same in the lower dtype

    def lower(self, sites: list[fx.Node]) -> int:
        """Lower `sites`, which must be in graph order."""
        self._lower_weights(sites)
        for node in sites:
            for operand in dict.fromkeys(float_operands(node)):
                node.replace_input_with(operand, self._lowered(operand))
            self._restore(node)
        return len(sites)

    def _lower_weights(self, sites: list[fx.Node]) -> None:
        """Store in the lower dtype each weight that only lowered operators read (1)."""
        inside = set(sites)
        for name in sorted({str(o.target) for node in sites for o in float_operands(node) if o.op == "get_attr"}):
            holders = list(self._gm.graph.find_nodes(op="get_attr", target=name))
            tensor = get_tensor(self._gm, name)
            if tensor.dtype != torch.float32:
                raise PassError(f"{name} is {tensor.dtype}: load the policy with dtype=torch.float32 to lower it")
            if all(inside.issuperset(holder.users) for holder in holders):
                replace_tensor(self._gm, name, DeferredWeight(tensor, dtype=self._dtype))
                self._lower_of.update(zip(holders, holders, strict=True))

    def _lowered(self, node: fx.Node) -> fx.Node:
        """Return the value of `node` in the lower dtype."""
        if node not in self._lower_of:  # 1 and 2 are known
            with self._gm.graph.inserting_after(node):
                if self._moves_lower_value(node):  # 3
                    source = argument(node, 0)
                    lowered = self._gm.graph.node_copy(node, {source: self._lowered(source)}.__getitem__)
                else:  # 4
                    lowered = self._gm.graph.call_function(aten.to.dtype, (node, self._dtype))
            lowered.meta = _as_written_here(node)
            self._lower_of[node] = lowered
        return self._lower_of[node]

    def _moves_lower_value(self, node: fx.Node) -> bool:
        """Tell whether `node` is a chain of views and copies of a value that exists in the lower dtype."""
        while is_call(node, operator.getitem, *_VIEWS):
            node = argument(node, 0)
            if node in self._lower_of:
                return True
        return False

    def _restore(self, node: fx.Node) -> None:
        """Cast the result of a lowered operator back to float32 for its readers, and remember the lower one (2)."""
        graph = self._gm.graph
        with graph.inserting_after(node):
            restored = graph.call_function(aten.to.dtype, (node, torch.float32))
        node.replace_all_uses_with(restored, delete_user_cb=lambda user: user is not restored)
        restored.meta = _as_written_here(node)
        if "stage" in node.meta:
            restored.meta["stage"] = node.meta.pop("stage")
        node.meta.pop("val", None)
        self._lower_of[restored] = node


def _as_written_here(node: fx.Node) -> dict[str, object]:
    """Return the metadata of a new node that belongs to the module of `node`."""
    path = module_path(node)
    return {"nn_module_stack": {path: (path, path)}}
