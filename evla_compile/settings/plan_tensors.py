"""Tensors of a plan, and the safetensors file that they are kept in; no torch, and no code in the file.

The format is that of the safetensors library: 8 bytes with the length of a JSON header, the header, the values.
"""

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from evla_compile.errors import CalibrationError
from evla_compile.json_text import to_json_text
from evla_compile.settings.budgets.plan_values import MAX_NAMED, index

TensorType: TypeAlias = Literal["F32", "F16", "BF16"]
"""Dtype of a tensor, by its name in safetensors files."""

_HELD: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),  # numpy has no bfloat16: its bits
}
_LONGEST_HEADER = 10_000_000  # bytes
_DIMENSIONS = 8


@dataclass(frozen=True, slots=True, eq=False)
class PlanTensor:
    """A tensor in host memory, or mapped from a file."""

    dtype: TensorType
    """Its dtype."""
    values: NDArray[Any]
    """Its values: float32, float16, or for BF16 their bits as uint16."""

    def __post_init__(self) -> None:
        if self.dtype not in get_args(TensorType) or self.values.dtype != _HELD[self.dtype]:
            raise ValueError(f"a tensor of {self.dtype!r} in an array of {self.values.dtype}: expected {_HELD}")

    @property
    def form(self) -> dict[str, Any]:
        """Its dtype and shape, as JSON-ready values."""
        return {"dtype": self.dtype, "shape": list(self.values.shape)}

    def is_finite(self) -> bool:
        """Tell whether no value is infinite or NaN."""
        if self.dtype == "BF16":
            return bool(((self.values & 0x7F80) != 0x7F80).all())  # an exponent of ones is neither
        return bool(np.isfinite(self.values).all())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlanTensor) and self.dtype == other.dtype and np.array_equal(self.values, other.values)

    def __hash__(self) -> int:
        return hash((self.dtype, self.values.shape))


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorFile:
    """What a plan's JSON says of the safetensors file that belongs to it."""

    sha256: str
    """Digest of its contents."""
    size: int
    """Its size in bytes."""
    count: int
    """Tensors in it."""

    @classmethod
    def of(cls, tensors: Mapping[str, PlanTensor]) -> Self:
        """Return what the file of these tensors will be."""
        digest, size = hashlib.sha256(), 0
        for part in _parts(tensors):
            digest.update(part)
            size += len(part)
        return cls(sha256=digest.hexdigest(), size=size, count=len(tensors))

    @classmethod
    def from_json(cls, data: object) -> Self | None:
        """Read `asdict`'s form back, None as none.

        Raises:
            ValueError: it is malformed.
        """
        if data is None:
            return None
        if not isinstance(data, Mapping) or data.keys() != {"sha256", "size", "count"}:
            raise ValueError(f"tensors {data!s:.60}: expected an object with sha256, size and count")
        digest = data["sha256"]
        if not isinstance(digest, str) or not re.fullmatch("[0-9a-f]{64}", digest):
            raise ValueError(f"sha256 of the tensors {digest!r:.80}: expected 64 hexadecimal digits")
        return cls(sha256=digest, size=index(data["size"]), count=index(data["count"]))

    def read(self, path: Path) -> dict[str, PlanTensor]:
        """Map the tensors of the file, if it is this one.

        Raises:
            CalibrationError: it is missing, another one, or malformed.
        """
        try:
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise CalibrationError(
                f"the plan's tensors cannot be read ({error}): keep {path.name} beside the plan, as it was written"
            ) from error
        if digest != self.sha256:
            raise CalibrationError(
                f"{path} is not the file that the plan was written with: its sha256 is {digest[:16]}..., the plan says"
                f" {self.sha256[:16]}...; copy both files together, or calibrate again"
            )
        return read_tensors(path)


def tensors_beside(plan: Path) -> Path:
    """Return the file for the tensors of a plan, by the plan's JSON file."""
    return plan.with_suffix(".safetensors")


def write_tensors(path: Path, tensors: Mapping[str, PlanTensor]) -> None:
    """Write tensors, in the order of their names, as a safetensors file.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("wb") as file:
        for part in _parts(tensors):
            file.write(part)


def _parts(tensors: Mapping[str, PlanTensor]) -> Iterator[bytes | memoryview]:
    """Yield the bytes of a safetensors file, piece by piece."""
    header: dict[str, Any] = {}
    end = 0
    for name in sorted(tensors):
        start, end = end, end + tensors[name].values.nbytes
        header[name] = {**tensors[name].form, "data_offsets": [start, end]}
    text = to_json_text(header).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of 8 bytes
    yield len(text).to_bytes(8, "little") + text
    for name in sorted(tensors):
        yield np.ascontiguousarray(tensors[name].values).data.cast("B")


def read_tensors(path: Path) -> dict[str, PlanTensor]:
    """Map the tensors of a safetensors file, which may come from anywhere.

    Raises:
        CalibrationError: the file is missing or malformed, or a value is not finite.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > _LONGEST_HEADER:
                raise ValueError(f"a header of {length} bytes")
            header = json.loads(file.read(length))
        size = path.stat().st_size - 8 - length
        return _mapped(path, header, 8 + length, size)
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise CalibrationError(f"{path}: no tensors of a plan in the safetensors format ({error})") from error


def _mapped(path: Path, header: Any, first: int, size: int) -> dict[str, PlanTensor]:
    if not isinstance(header, dict) or not 0 < len(header) <= MAX_NAMED:
        raise ValueError("its header is no JSON object with tensors")
    found, expected = {}, 0
    entries = [(name, about) for name, about in header.items() if name != "__metadata__"]
    for name, about in sorted(entries, key=lambda entry: entry[1]["data_offsets"]):
        dtype, shape, (start, end) = about["dtype"], about["shape"], about["data_offsets"]
        if dtype not in _HELD or not isinstance(shape, list) or not 0 < len(shape) <= _DIMENSIONS:
            raise ValueError(f"{name!r:.80} is {dtype!r:.20} of shape {shape!r:.40}")
        if any(isinstance(extent, bool) or not isinstance(extent, int) or extent < 1 for extent in shape):
            raise ValueError(f"{name!r:.80} has the shape {shape!r:.40}")
        if start != expected or end - start != math.prod(shape) * _HELD[dtype].itemsize or end > size:
            raise ValueError(f"{name!r:.80} is at the bytes {start} to {end} of {size}")
        expected = end
        values = np.memmap(path, dtype=_HELD[dtype], mode="r", offset=first + start, shape=tuple(shape))
        found[name] = PlanTensor(dtype, values)
        if not found[name].is_finite():
            raise ValueError(f"{name!r:.80} has values that are not finite")
    if expected != size:
        raise ValueError(f"{size - expected} bytes belong to no tensor")
    return found
