"""The records of a manifest: a file, a tensor, a part of the graph, an engine; no torch.

A manifest may come from anywhere, so every record checks its values.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self

from evla_compile.artifact.fields import objects_at, value_at
from evla_compile.settings.engine_settings import FLAVOURS, Flavour

DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")
"""Dtypes of a graph's inputs and outputs, by numpy's names."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FileRecord:
    """One file of an artifact.

    Raises:
        ValueError: the name leads out of the artifact's folder, or the hash or the size cannot be one.
    """

    name: str
    """Plain file name, without any folder."""
    sha256: str
    """SHA-256 of the contents, 64 lower-case hexadecimal digits."""
    size: int
    """Bytes."""

    def __post_init__(self) -> None:
        plain = self.name == PurePosixPath(self.name).name == PureWindowsPath(self.name).name
        if not plain or self.name in ("", "..") or not self.name.isprintable():
            raise ValueError(f"file name {self.name!r}: expected a plain name without folders")
        if not re.fullmatch("[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256 {self.sha256!r} of {self.name}: expected 64 hexadecimal digits")
        if self.size < 0:
            raise ValueError(f"size {self.size} of {self.name}: expected 0 bytes or more")

    @classmethod
    def measure(cls, path: Path) -> Self:
        """Return the record of a file as it is on disk."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(name=path.name, sha256=digest, size=path.stat().st_size)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a JSON object; a ValueError names the key that is wrong."""
        return cls(
            name=value_at(data, "name", str), sha256=value_at(data, "sha256", str), size=value_at(data, "size", int)
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorSpec:
    """Name, dtype and static shape of one input or output of a graph.

    Raises:
        ValueError: the dtype is not among `DTYPES`, or a size is not a whole number from 1 up.
    """

    name: str
    """Name in the graph."""
    dtype: str
    """One of `DTYPES`."""
    shape: tuple[int, ...]
    """Sizes, batch first."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} of {self.name!r}: expected one of {', '.join(DTYPES)}")
        if any(type(size) is not int or size < 1 for size in self.shape):
            raise ValueError(f"shape {list(self.shape)} of {self.name!r}: expected whole numbers from 1 up")

    def __str__(self) -> str:
        return f"{self.name} {self.dtype}{list(self.shape)}"

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a JSON object; a ValueError names the key that is wrong."""
        return cls(
            name=value_at(data, "name", str),
            dtype=value_at(data, "dtype", str),
            shape=tuple(value_at(data, "shape", list)),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """One graph of the chain that computes a policy; most policies are a single part.

    Raises:
        ValueError: the name has other characters than a-z, 0-9, _ and -.
    """

    name: str
    """`policy`, or what the part computes, such as `perception`."""
    model: FileRecord
    """The ONNX graph."""
    data: tuple[FileRecord, ...]
    """External data of the graph; empty for a small one."""
    inputs: tuple[TensorSpec, ...]
    """Its inputs: inputs of the policy, and outputs of earlier parts."""
    outputs: tuple[TensorSpec, ...]
    """Its outputs: outputs of the policy, and values that later parts take."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,39}", self.name):
            raise ValueError(f"part {self.name!r}: expected a name of a-z, 0-9, _ and -")

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Its ONNX graph and external data."""
        return (self.model, *self.data)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a JSON object; a ValueError names the key that is wrong."""
        return cls(
            name=value_at(data, "name", str),
            model=FileRecord.from_json(value_at(data, "model", dict)),
            data=tuple(FileRecord.from_json(entry) for entry in objects_at(data, "data")),
            inputs=tuple(TensorSpec.from_json(entry) for entry in objects_at(data, "inputs")),
            outputs=tuple(TensorSpec.from_json(entry) for entry in objects_at(data, "outputs")),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRecord:
    """Engines that were built from the parts, and what they run on.

    Raises:
        ValueError: the flavour or a compute capability cannot be one, or TensorRT's GPU is not described.
    """

    flavour: Flavour
    """Library that built them and runs them."""
    version: str
    """Version of that library."""
    files: tuple[FileRecord, ...]
    """One engine for each part, in their order."""
    layers: tuple[int, ...]
    """Layers of each engine's network, as the builder parsed it."""
    platform: str
    """Operating system and processor that built them, such as `linux-x86_64`."""
    gpu: str | None
    """Name of the GPU that built them; None where none was needed, as for TensorRT-RTX."""
    gpu_processors: int | None
    """Its streaming multiprocessors, by which modules that share a name differ: an AGX Orin and an Orin NX."""
    gpu_memory_bytes: int | None
    """Its memory."""
    compute_capabilities: tuple[str, ...]
    """GPUs that run them, such as `8.9`; empty for TensorRT-RTX's portable engines: 8.0, 8.6, 8.9 and 12.x."""
    hardware_compatible: bool
    """Whether they run on every GPU from compute capability 8.0 on, not on one kind alone; TensorRT only."""
    version_compatible: bool
    """Whether later versions of TensorRT can run them too."""

    def __post_init__(self) -> None:
        if self.flavour not in FLAVOURS:
            raise ValueError(f"flavour {self.flavour!r}: expected one of {', '.join(FLAVOURS)}")
        for capability in self.compute_capabilities:
            if not isinstance(capability, str) or not re.fullmatch(r"\d{1,2}\.\d", capability):
                raise ValueError(f"compute capability {capability!r}: expected one such as 8.9")
        described = (self.gpu, self.gpu_processors, self.gpu_memory_bytes)
        if self.flavour == "tensorrt" and None in described:
            raise ValueError(
                f"gpu, gpu_processors and gpu_memory_bytes are {described}: expected those of the GPU that built them"
            )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read a JSON object; a ValueError names the key that is wrong."""
        layers = value_at(data, "layers", list)
        if any(type(count) is not int or count < 1 for count in layers):
            raise ValueError(f"layers {layers!r:.80}: expected whole numbers from 1 up")
        flavour: Any = value_at(data, "flavour", str)
        return cls(
            flavour=flavour,
            version=value_at(data, "version", str),
            files=tuple(FileRecord.from_json(entry) for entry in objects_at(data, "files")),
            layers=tuple(layers),
            platform=value_at(data, "platform", str),
            gpu=None if data.get("gpu") is None else value_at(data, "gpu", str),
            gpu_processors=None if data.get("gpu_processors") is None else value_at(data, "gpu_processors", int),
            gpu_memory_bytes=None if data.get("gpu_memory_bytes") is None else value_at(data, "gpu_memory_bytes", int),
            compute_capabilities=tuple(value_at(data, "compute_capabilities", list)),
            hardware_compatible=value_at(data, "hardware_compatible", bool),
            version_compatible=value_at(data, "version_compatible", bool),
        )
