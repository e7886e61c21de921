"""The manifest of an artifact: what a runtime must know of a compiled policy besides its graph; no torch.

A manifest may come from anywhere, so nothing in it is believed before it is checked.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Self, TypeVar

from evla_compile.config import CompileConfig
from evla_compile.errors import ArtifactError, CalibrationError, CheckpointError
from evla_compile.plan import Plan
from evla_compile.processor import ActionStatistics, read_statistics

FORMAT = "evla_compile/1"
"""Version of the manifest's layout; another one is refused."""
DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")
"""What an input or output of a graph may hold, by numpy's names."""

_INPUT_FORMS = [("image", "uint8", 4), ("input_ids", "int64", 2), ("text_length", "int64", 1), ("noise", "float32", 3)]
_JSON_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number"}
_Json = TypeVar("_Json", dict[str, Any], list[Any], str, int)


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
        return cls(name=_get(data, "name", str), sha256=_get(data, "sha256", str), size=_get(data, "size", int))


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
        return cls(name=_get(data, "name", str), dtype=_get(data, "dtype", str), shape=tuple(_get(data, "shape", list)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a runtime must know of a compiled policy besides its graph.

    Raises:
        ValueError: the inputs or outputs are not those of a CogACT graph of this configuration, two files share a
            name, or `pad_id` is negative.
    """

    created_by: str
    """Version of evla_compile that wrote the artifact."""
    model: FileRecord
    """The ONNX graph."""
    data: tuple[FileRecord, ...]
    """External data of the graph; empty for a small one."""
    tokenizer: FileRecord
    """The tokenizer.json in use."""
    report: FileRecord
    """The compile report, JSON."""
    cases: FileRecord
    """Calls of the torch graph, recorded to verify a runtime with."""
    inputs: tuple[TensorSpec, ...]
    """image [B,S,S,3], input_ids [B,T], text_length [B] and noise [B,A,F], in this order."""
    outputs: tuple[TensorSpec, ...]
    """samples [B,A,F], and whatever else the graph yields."""
    config: CompileConfig
    """Settings of the compilation, B (`batch_size`) and T (`text_tokens`) among them."""
    plan: Plan
    """Which layers and neurons stay."""
    statistics: Mapping[str, ActionStatistics]
    """Action statistics by dataset name."""
    pad_id: int
    """Token id that fills a prompt up to the text budget."""
    opset: int
    """ONNX opset of the graph."""
    versions: Mapping[str, str]
    """Versions of the libraries that made the artifact, by name."""

    def __post_init__(self) -> None:
        names = [record.name for record in self.files]
        if len(set(names)) != len(names):
            raise ValueError(f"files {names}: expected names that differ")
        if self.pad_id < 0:
            raise ValueError(f"pad_id {self.pad_id}: expected a token id from 0 up")
        forms = [(spec.name, spec.dtype, len(spec.shape)) for spec in self.inputs]
        if forms != _INPUT_FORMS:
            raise ValueError(f"inputs are {forms} as (name, dtype, rank): expected {_INPUT_FORMS}")
        batch, side = self.config.batch_size, self.image_side
        expected = [(batch, side, side, 3), (batch, self.config.text_tokens), (batch,), (batch, *self.noise_shape[1:])]
        if [spec.shape for spec in self.inputs] != expected:
            raise ValueError(f"shapes of {', '.join(map(str, self.inputs))}: expected {expected} by the configuration")
        samples = TensorSpec(name="samples", dtype="float32", shape=self.noise_shape)
        outputs = {spec.name: spec for spec in self.outputs}
        if outputs.get("samples") != samples or len(outputs) != len(self.outputs):
            raise ValueError(f"outputs {', '.join(map(str, self.outputs))}: expected {samples} among names that differ")

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the artifact but the manifest."""
        return (self.model, *self.data, self.tokenizer, self.report, self.cases)

    @property
    def image_side(self) -> int:
        """S, the side in pixels of the image that the graph takes."""
        return self.inputs[0].shape[1]

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that the graph takes, (B, A, F)."""
        return self.inputs[3].shape

    def to_json(self) -> dict[str, Any]:
        """Return the manifest as JSON-ready values."""
        return {
            "format": FORMAT,
            "created_by": self.created_by,
            "model": asdict(self.model),
            "data": [asdict(record) for record in self.data],
            "tokenizer": asdict(self.tokenizer),
            "report": asdict(self.report),
            "cases": asdict(self.cases),
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
            "config": self.config.to_json(),
            "plan": self.plan.to_json(),
            "statistics": {dataset: entry.to_json() for dataset, entry in self.statistics.items()},
            "pad_id": self.pad_id,
            "opset": self.opset,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read `to_json`'s form.

        Raises:
            ValueError: something is missing, of another type, or out of range.
            CalibrationError: the plan is malformed.
            CheckpointError: the statistics are malformed.
        """
        if _get(data, "format", str) != FORMAT:
            raise ValueError(f"'format' is {data['format']!r}, but this version of evla_compile reads {FORMAT!r}")
        versions = _get(data, "versions", dict)
        return cls(
            created_by=_get(data, "created_by", str),
            model=FileRecord.from_json(_get(data, "model", dict)),
            data=tuple(FileRecord.from_json(entry) for entry in _get_objects(data, "data")),
            tokenizer=FileRecord.from_json(_get(data, "tokenizer", dict)),
            report=FileRecord.from_json(_get(data, "report", dict)),
            cases=FileRecord.from_json(_get(data, "cases", dict)),
            inputs=tuple(TensorSpec.from_json(entry) for entry in _get_objects(data, "inputs")),
            outputs=tuple(TensorSpec.from_json(entry) for entry in _get_objects(data, "outputs")),
            config=CompileConfig.from_json(_get(data, "config", dict)),
            plan=Plan.from_json(_get(data, "plan", dict)),
            statistics=read_statistics(_get(data, "statistics", dict)),
            pad_id=_get(data, "pad_id", int),
            opset=_get(data, "opset", int),
            versions={library: _get(versions, library, str) for library in versions},
        )


def read_manifest(path: Path) -> Manifest:
    """Read and check a manifest.

    Raises:
        ArtifactError: it cannot be read, or is not a manifest of this format; the message says what is wrong.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict):
            raise ValueError(f"expected a JSON object, found {type(data).__name__}")
        return Manifest.from_json(data)
    except (OSError, ValueError, RecursionError, CalibrationError, CheckpointError) as error:
        raise ArtifactError(f"manifest {path}: {error}; compile the policy again with this version") from error


def write_manifest(manifest: Manifest, path: Path) -> None:
    """Write a manifest as JSON."""
    path.write_text(json.dumps(manifest.to_json(), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def _get(data: Mapping[str, Any], key: str, kind: type[_Json]) -> _Json:
    if key not in data:
        raise ValueError(f"{key!r} is missing")
    value = data[key]
    # The exact type: isinstance would let JSON's true and false pass as whole numbers.
    if type(value) is not kind:
        raise ValueError(f"{key!r} is {value!r:.80}: expected {_JSON_WORDS[kind]}")
    return value


def _get_objects(data: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    entries = _get(data, key, list)
    for entry in entries:
        if not isinstance(entry, dict):
            raise ValueError(f"{key!r} holds {entry!r:.80}: expected objects")
    return entries
