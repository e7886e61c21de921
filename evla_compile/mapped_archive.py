"""The tensors of a torch archive, mapped from it for reading alone."""

import pickle
import warnings
from collections.abc import Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from evla_compile.errors import CheckpointError

_AGAIN = "copy or download it again"
_FOREIGN = MappingProxyType(
    {
        b"": "this is an empty file; " + _AGAIN,
        b"\x80": "this is torch's format of before 2020; re-save it with torch.load and torch.save",
        b"v": "this is a Git LFS pointer; run git lfs pull",
    }
)
"""Advice by the first byte of a file that is no torch archive."""
# What torch's reader and its restricted unpickler raise on damaged bytes, depending on where the damage is.
_DAMAGE = (RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError)


def read_archive(file: Path) -> Any:
    """Return what torch.save wrote to a file, its tensors without data, for `map_tensors`.

    Raises:
        CheckpointError: it is no such file, is damaged, or holds other Python objects beside tensors.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(2)
        if start != b"PK":
            raise CheckpointError(f"expected a checkpoint written by torch.save; {_FOREIGN.get(start[:1], _AGAIN)}")
        with FakeTensorMode():  # reads forms and offsets alone
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it is damaged, or holds Python objects beside tensors, which are refused since they could run code;"
            " download it again, or re-save its tensors alone"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"it is truncated or damaged ({error!s:.200}); copy or download it again") from error


def map_tensors(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint file, of which only forms and offsets are known, mapped from it.

    The mapping is read-only: torch's own is private and writable, for which the system wants to set memory aside, so
    that 30 GB cannot be mapped where 24 GB are installed. Writing into such a tensor ends the process.

    Raises:
        CheckpointError: a tensor claims more than the file holds.
    """
    with file.open("rb") as stream, warnings.catch_warnings():
        mapping = mmap(stream.fileno(), 0, access=ACCESS_READ)
        warnings.filterwarnings("ignore", message="The given buffer is not writable")  # nothing here writes weights
        return {name: _view(name, tensor, mapping) for name, tensor in tensors.items()}


def _view(name: str, tensor: Tensor, mapping: mmap) -> Tensor:
    if tensor.layout != torch.strided or not tensor.numel():
        return torch.empty(tensor.shape, dtype=tensor.dtype, layout=tensor.layout)  # refused by its form later
    storage = tensor.untyped_storage()
    count = storage.nbytes() // tensor.element_size()
    offset = storage._checkpoint_offset  # set where fake tensors are loaded
    if offset is None:
        raise CheckpointError(
            f"torch {torch.__version__} does not tell where in the file {name} is: install 2.11 or newer"
        )
    try:
        stored = torch.frombuffer(mapping, dtype=tensor.dtype, count=count, offset=offset)
        return stored.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(f"{name} reaches beyond what the file holds of it ({error!s:.200}); {_AGAIN}") from error
