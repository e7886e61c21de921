"""The inputs of a finished graph as tensors."""

import torch
from torch import Tensor

from evla_compile.host.inputs import GraphInputs


def to_tensors(inputs: GraphInputs, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return image, input ids, text length and noise on a device, in the order of the graph."""
    image, input_ids, text_length, noise = (torch.from_numpy(array).to(device) for array in inputs.arrays)
    return image, input_ids, text_length, noise
