"""Map the tensors of a torch archive from the file: read from disk when used, copied to memory when written."""

import logging
import mmap
import pickle
import struct
import sys
import zipfile
import zlib
from collections import Counter
from io import BytesIO
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor, _weights_only_unpickler
from torch.serialization import StorageType
from torch.storage import TypedStorage, UntypedStorage

from evla_compile.errors import CheckpointError
from evla_compile.memory import available_memory
from evla_compile.units import bytes_text

_LOG = logging.getLogger(__name__)

_AGAIN = "copy or download it again"
_RESAVE = "re-save it with torch.load(..., mmap=True) and torch.save"
_FOREIGN = MappingProxyType(
    {
        b"": "this is an empty file; " + _AGAIN,
        b"\x80": "this is torch's format of before 2020; re-save it with torch.load and torch.save",
        b"v": "this is a Git LFS pointer; run git lfs pull",
    }
)
"""Advice by the first byte of a file that is no torch archive."""
# Exceptions that zipfile and torch's restricted unpickler raise on damaged bytes, depending on the place.
_DAMAGE = (
    *(RuntimeError, OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, AssertionError),
    *(zipfile.BadZipFile, zlib.error, struct.error, OverflowError),
)
_PICKLE = "data.pkl"
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra fields
_UNTYPED_ALIGNMENT = 8  # a storage without a dtype may be read as any dtype


def read_archive(file: Path) -> Any:
    """Return the object that torch.save wrote to a file, with its tensors mapped from the file.

    The offset of each tensor is read from the header of its zip member, since other tools than torch write members in
    another order and at other offsets. A tensor that is not aligned to its dtype is copied into memory, since compiled
    loops need aligned data.

    Writing into a tensor changes a private copy of its pages, never the file.

    Raises:
        CheckpointError: it is no such file, is damaged, compressed or of the other byte order, contains other Python
            objects than tensors, or has tensors to copy that do not fit into free memory.
    """
    with file.open("rb") as stream:
        start = stream.read(2)
    if start != b"PK":
        raise CheckpointError(f"expected a checkpoint written by torch.save; {_FOREIGN.get(start[:1], _AGAIN)}")
    try:
        with zipfile.ZipFile(file) as archive:
            members = _Members(archive, _map(file))
            unpickler = _weights_only_unpickler.Unpickler(BytesIO(members.read(_PICKLE)), encoding="utf-8")
            unpickler.persistent_load = members.storage  # type: ignore[method-assign]  # as torch.load does
            return unpickler.load()  # type: ignore[no-untyped-call]  # as above
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            "it is damaged, or holds Python objects beside tensors, which are refused since they could run code;"
            " download it again, or re-save its tensors alone"
        ) from error
    except _DAMAGE as error:
        raise CheckpointError(f"it is truncated or damaged ({error!s:.200}); copy or download it again") from error
    finally:
        torch._utils._validate_loaded_sparse_tensors()  # type: ignore[no-untyped-call]  # forgets them, torch left it so


def _map(file: Path) -> mmap.mmap:
    """Map a file privately and writable, without reserving memory for pages that might be written.

    With such a reservation, as in torch's own mapping, 30 GB cannot be mapped on a machine with 24 GB of memory.
    """
    # Not every Python version has the constant; this is its value on Linux.
    unreserved = getattr(mmap, "MAP_NORESERVE", 0x4000 if sys.platform == "linux" else 0)
    with file.open("rb") as stream:
        try:
            return mmap.mmap(
                stream.fileno(), 0, flags=mmap.MAP_PRIVATE | unreserved, prot=mmap.PROT_READ | mmap.PROT_WRITE
            )
        except OSError as error:
            size = file.stat().st_size
            raise CheckpointError(
                f"its {bytes_text(size)} cannot be mapped ({error}): expected a system that maps files without setting"
                " memory aside; on Linux see `sysctl vm.overcommit_memory` (0 or 1) and `ulimit -v`"
            ) from error


def _fixed(stored: Tensor) -> Tensor:
    """Return a tensor over the same memory whose storage cannot grow, as a storage mapped from a file cannot.

    A storage of torch's own would grow, with whatever is in memory, for a tensor that claims more than it holds.
    """
    return torch.from_numpy(stored.numpy())


class _Members:
    """The members of a zip archive, located by their own headers."""

    def __init__(self, archive: zipfile.ZipFile, mapping: mmap.mmap) -> None:
        self._archive, self._mapping = archive, mapping
        self._counts = Counter(archive.namelist())
        self._storages: dict[str, TypedStorage] = {}
        self._copied = 0
        roots = [name.removesuffix(_PICKLE) for name in self._counts if name.endswith("/" + _PICKLE)]
        if len(roots) != 1:
            raise CheckpointError(
                f"expected a zip written by torch.save, found {'no' if not roots else 'more than one'} {_PICKLE} among"
                f" its {len(self._counts)} members; give a CogACT checkpoint"
            )
        self._root = roots[0]
        if self._root + "constants.pkl" in self._counts:
            raise CheckpointError("expected a checkpoint, found a TorchScript program; give a CogACT checkpoint")
        order = self.read("byteorder").decode("latin-1") if self._root + "byteorder" in self._counts else "little"
        if order != sys.byteorder:
            raise CheckpointError(
                f"{self._root}byteorder says {order!r}, and this machine is {sys.byteorder}-endian; re-save it with"
                " torch.load and torch.save"
            )

    def read(self, name: str) -> bytes:
        """Return the contents of a small member."""
        place = self._place(self._root + name)
        return self._mapping[place : place + self._info(self._root + name).file_size]

    def storage(self, identity: tuple[str, type[UntypedStorage] | StorageType, str, str, int]) -> TypedStorage:
        """Return a storage mapped from its member; called by the unpickler.

        Args:
            identity: "storage", its type, the name of its member, its device at the time of saving, and its length.
        """
        _, kind, key, _, count = identity
        dtype = kind.dtype if isinstance(kind, StorageType) else torch.uint8
        if key not in self._storages:
            alignment = dtype.itemsize if isinstance(kind, StorageType) else _UNTYPED_ALIGNMENT
            untyped = self._untyped(f"{self._root}data/{key}", count * dtype.itemsize, alignment)
            self._storages[key] = TypedStorage(  # type: ignore[no-untyped-call]  # torch left it so
                wrap_storage=untyped, dtype=dtype, _internal=True
            )
        return self._storages[key]

    def _untyped(self, name: str, size: int, alignment: int) -> UntypedStorage:
        found, place = self._info(name).file_size, self._place(name)
        if found != size:
            raise CheckpointError(f"{name} holds {found} bytes, and a tensor in it claims {size}; {_AGAIN}")
        if not size:
            return _fixed(torch.empty(0, dtype=torch.uint8, device="cpu")).untyped_storage()
        stored: Tensor = torch.frombuffer(self._mapping, dtype=torch.uint8, count=size, offset=place)
        if place % alignment:
            stored = self._copy(name, stored)
        return stored.untyped_storage()

    def _copy(self, name: str, stored: Tensor) -> Tensor:
        free = available_memory()
        if free is not None and stored.nbytes > free:
            raise CheckpointError(
                f"{name} is not aligned to its dtype in the file, so it has to be copied, which needs"
                f" {bytes_text(stored.nbytes)} of memory, and {bytes_text(free)} are free beside the"
                f" {bytes_text(self._copied)} copied so far; {_RESAVE}"
            )
        if not self._copied:
            _LOG.info("%s is not aligned to its dtype: it is copied into memory, as all further such tensors", name)
        self._copied += stored.nbytes
        return _fixed(stored.clone())

    def _info(self, name: str) -> zipfile.ZipInfo:
        count = self._counts[name]
        if count != 1:
            what = f"several members {name}" if count else f"no member {name}, which its {_PICKLE} names"
            raise CheckpointError(f"the zip holds {what}; {_AGAIN}")
        info = self._archive.getinfo(name)
        if info.flag_bits & 1:
            raise CheckpointError(f"{name} is encrypted: expected a zip as torch.save writes it; decrypt it first")
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{name} is compressed (the zip format's method {info.compress_type}), so that it cannot be mapped:"
                " expected stored members, as torch.save writes them; re-save it with torch.load and torch.save"
            )
        return info

    def _place(self, name: str) -> int:
        """Return the offset of a member's contents; its own header has extra fields that the directory lacks."""
        info = self._info(name)
        start = info.header_offset
        signature, name_length, extra_length = _LOCAL_HEADER.unpack(self._mapping[start : start + _LOCAL_HEADER.size])
        named = start + _LOCAL_HEADER.size + name_length
        written = info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if signature != b"PK\x03\x04" or self._mapping[named - name_length : named] != written:
            raise CheckpointError(f"the header of {name} is not where the zip's directory says; {_AGAIN}")
        place = named + extra_length
        if place + info.file_size > len(self._mapping):
            raise CheckpointError(f"{name} reaches beyond the end of the file; {_AGAIN}")
        return cast("int", place)
