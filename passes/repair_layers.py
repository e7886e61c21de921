"""Replace the projections of kept decoder layers by refit ones."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, fx

from evla_compile.errors import PassError
from evla_compile.graph.contract import GraphPass, add_tensor, get_tensor, replace_tensor
from evla_compile.graph.sites import DecoderLayer, argument, decoder_layers, module_path


@dataclass(frozen=True, kw_only=True, eq=False)
class RepairLayers(GraphPass):
    """Put refit weights, and a bias behind the MLP, into kept decoder layers, lossy.

    Not in EfficientVLA: the weights are fitted in closed form to the dense policy's residual stream on calibration
    frames, see `evla_compile.calibration.repair`. Of a layer, three things change:

    1. the weight of the output projection, [D,H];
    2. the weight of the down projection, [D,M], M the neurons that stay;
    3. the down projection adds a bias [D], the only operator more.

    Refuses layers that the graph does not have, tensors of other shapes or dtypes than the weights in the graph, and a
    layer that has a bias already.
    """

    exact: ClassVar[bool] = False

    layers: tuple[int, ...]
    """Indices of the layers that are refit."""
    tensors: Mapping[str, Tensor] = field(repr=False)
    """Of each layer, by module path, `self_attn.o_proj.weight`, `mlp.down_proj.weight` and `mlp.down_proj.bias`."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the weights of every named layer."""
        found = {layer.index: layer for layer in decoder_layers(gm.graph)}
        missing = sorted(set(self.layers) - found.keys())
        if missing:
            raise PassError(f"no decoder layers {missing} in the graph to repair; it has {sorted(found)}")
        for index in self.layers:
            self._repair(gm, found[index])
        return len(self.layers)

    def _repair(self, gm: fx.GraphModule, layer: DecoderLayer) -> None:
        down = layer.named("mlp.down_proj")
        if len(down.args) > 2:
            raise PassError(f"decoder layer {layer.index}: its down projection has a bias already: repair it once")
        for projection in (layer.named("self_attn.o_proj"), down):  # 1 and 2
            weight = argument(projection, 1)
            old = get_tensor(gm, str(weight.target))
            new = self._tensor(f"{module_path(projection)}.weight", tuple(old.shape), old.dtype)
            if len(weight.users) != 1:
                raise PassError(
                    f"decoder layer {layer.index}: {weight.target} is read elsewhere too, so it cannot be refit"
                )
            replace_tensor(gm, str(weight.target), new.to(old.device))
        name = f"{module_path(down)}.bias"
        bias = self._tensor(name, (old.shape[0],), old.dtype)
        with gm.graph.inserting_before(down):  # 3
            node = gm.graph.get_attr(add_tensor(gm, name, bias.to(old.device)))
        node.meta["nn_module_stack"] = dict(down.meta["nn_module_stack"])
        down.args = (*down.args[:2], node)

    def _tensor(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a refit tensor.

        Raises:
            PassError: there is none of this name, or it has another shape or dtype.
        """
        if name not in self.tensors:
            raise PassError(
                f"no refit {name}: the tensors of the plan are for other layers, {sorted(self.tensors)!s:.200}"
            )
        tensor = self.tensors[name]
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise PassError(
                f"refit {name} is {tensor.dtype}{list(tensor.shape)}, the graph needs {dtype}{list(shape)}: calibrate"
                " again with these budgets, on the policy in this dtype"
            )
        return tensor
