"""Cut the width of the vision towers' MLPs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, get_tensor, replace_tensor
from evla_compile.graph.deferred import cut
from evla_compile.graph.sites import VisionBlock, vision_blocks


@dataclass(frozen=True, kw_only=True, eq=False)
class PruneVision(GraphPass):
    """Keep some hidden neurons of the MLPs of the vision towers, lossy, and put refit second layers in.

    Not in EfficientVLA, which leaves the towers alone. Of M neurons K stay: the first linear layer [M,D], [M] becomes
    [K,D], [K], the second one [D,M] becomes [D,K], with its own bias [D]. Of the blocks in `refit`, weight and bias of
    the second layer are given instead, fitted in closed form to the dense tower on calibration frames, see
    `evla_compile.calibration.vision_cut`. No operator is added. Cut weights are deferred: computed when read, then
    freed. Refuses blocks that the graph does not have, indices that do not ascend or fit, and refit tensors of other
    shapes or dtypes.
    """

    exact: ClassVar[bool] = False

    neurons: Mapping[str, tuple[int, ...]] = field(repr=False)
    """The ascending indices of the neurons that stay, by the block's module path."""
    refit: tuple[str, ...] = field(default=(), repr=False)
    """Module paths of the blocks whose second layer is given."""
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Of each of them, by module path, `mlp.fc2.weight` [D,K] and `mlp.fc2.bias` [D]."""

    def __repr__(self) -> str:
        widths = sorted({len(kept) for kept in self.neurons.values()})
        neurons = widths[0] if len(widths) == 1 else widths
        return f"PruneVision(blocks={len(self.neurons)}, neurons={neurons}, refit={len(self.refit)})"

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Slice, or replace, the weights of every named block."""
        blocks = {block.path: block for block in vision_blocks(gm.graph)}
        missing = sorted({*self.neurons, *self.refit} - blocks.keys())
        if missing:
            raise PassError(f"no vision blocks {missing} in the graph; it has {sorted(blocks)}")
        if strange := sorted(set(self.refit) - self.neurons.keys()):
            raise PassError(f"vision blocks {strange} are refit and not cut: name their neurons")
        return sum(self._cut(gm, blocks[path], kept) for path, kept in self.neurons.items())

    def _cut(self, gm: fx.GraphModule, block: VisionBlock, kept: tuple[int, ...]) -> int:
        """Cut one block's MLP to the neurons `kept`; return 1, or 0 where all stay as they are."""
        names = [_own_name(block, layer, place) for layer, place in _PARTS]
        up, up_bias, down, down_bias = (get_tensor(gm, name) for name in names)
        width = up.shape[0]
        ascending = all(a < b for a, b in pairwise(kept))
        if not kept or not ascending or kept[0] < 0 or kept[-1] >= width:
            raise PassError(f"{block.path}: neurons must ascend within 0..{width - 1}, at least one")
        refit = block.path in self.refit
        if len(kept) == width and not refit:
            return 0
        if len(kept) < width:
            index = torch.tensor(kept)
            for name, tensor, axis in zip(names, (up, up_bias, down), (0, 0, 1), strict=False):
                replace_tensor(gm, name, cut(tensor, axis, index))
        if refit:
            shapes = {"weight": (down.shape[0], len(kept)), "bias": (down.shape[0],)}
            for name, old, (kind, shape) in zip(names[2:], (down, down_bias), shapes.items(), strict=True):
                replace_tensor(gm, name, self._tensor(f"{block.path}.mlp.fc2.{kind}", shape, old.dtype).to(old.device))
        return 1

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a refit tensor.

        Raises:
            PassError: there is none of this name, or it has another shape or dtype.
        """
        if name not in self.tensors:
            raise PassError(f"no refit {name}: the tensors of the plan are others, {sorted(self.tensors)!s:.200}")
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise PassError(
                f"refit {name} is {tensor.dtype}{list(tensor.shape)}, the graph needs {dtype}{list(shape)}: calibrate"
                " again with these budgets, on the policy in this dtype"
            )
        return tensor


_PARTS = (("up", 1), ("up", 2), ("down", 1), ("down", 2))  # weight and bias of both layers, by place in the arguments


def _own_name(block: VisionBlock, layer: str, place: int) -> str:
    """Return the name of a tensor of one of a block's linear layers, which nothing else may read."""
    node: fx.Node = getattr(block, layer)
    tensor = node.args[place] if place < len(node.args) else None
    if not isinstance(tensor, fx.Node) or tensor.op != "get_attr" or len(tensor.users) != 1:
        kind = ("weight", "bias")[place - 1]
        raise PassError(f"{block.path}: the {kind} of its MLP's {layer} projection is not a tensor of its own")
    return str(tensor.target)
