"""Tensors of a plan to torch's and back."""

import torch
from torch import Tensor

from evla_compile.settings.plan_tensors import PlanTensor, TensorType

_NAMES: dict[torch.dtype, TensorType] = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}


def to_plan_tensor(tensor: Tensor) -> PlanTensor:
    """Return a float32, float16 or bfloat16 tensor as one of a plan, in host memory."""
    held = tensor.detach().cpu().contiguous()
    bits = held.view(torch.int16).numpy().view("<u2") if held.dtype == torch.bfloat16 else held.numpy()
    return PlanTensor(_NAMES[tensor.dtype], bits)


def to_tensor(tensor: PlanTensor) -> Tensor:
    """Return a tensor of a plan as torch's, a copy in memory that nobody else writes into."""
    values = tensor.values.astype(tensor.values.dtype, copy=True)
    if tensor.dtype == "BF16":
        return torch.from_numpy(values.view("<i2")).view(torch.bfloat16)
    return torch.from_numpy(values)
