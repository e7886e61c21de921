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

from evla_compile.config import PRECISIONS, CompileConfig, Precision
from evla_compile.engine_settings import FLAVOURS, Flavour
from evla_compile.errors import ArtifactError, CalibrationError, CheckpointError
from evla_compile.json_text import to_json_text
from evla_compile.plan import Plan
from evla_compile.processor import ActionStatistics, read_statistics

FORMAT = "evla_compile/4"
"""Version of the manifest's layout; another one is refused."""
DTYPES = ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")
"""What an input or output of a graph may hold, by numpy's names."""
MOST_TOKENS = 2**31 - 1
"""Most rows of a token embedding: beyond any, and within what every runtime indexes with."""

_INPUT_FORMS = [("image", "uint8", 4), ("input_ids", "int64", 2), ("text_length", "int64", 1), ("noise", "float32", 3)]
_JSON_WORDS = {dict: "an object", list: "a list", str: "a text", int: "a whole number", bool: "true or false"}
_Json = TypeVar("_Json", dict[str, Any], list[Any], str, int, bool)


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
class Part:
    """One graph of the chain that a policy is; most are a single one.

    Raises:
        ValueError: the name is not one.
    """

    name: str
    """`policy`, or what the part computes, such as `perception`."""
    model: FileRecord
    """The ONNX graph."""
    data: tuple[FileRecord, ...]
    """External data of the graph; empty for a small one."""
    inputs: tuple[TensorSpec, ...]
    """What it takes: inputs of the policy, and outputs of the parts in front of it."""
    outputs: tuple[TensorSpec, ...]
    """What it yields: outputs of the policy, and whatever a part behind it takes."""

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
            name=_get(data, "name", str),
            model=FileRecord.from_json(_get(data, "model", dict)),
            data=tuple(FileRecord.from_json(entry) for entry in _get_objects(data, "data")),
            inputs=tuple(TensorSpec.from_json(entry) for entry in _get_objects(data, "inputs")),
            outputs=tuple(TensorSpec.from_json(entry) for entry in _get_objects(data, "outputs")),
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
    """Whether TensorRT made them for every GPU from compute capability 8.0 on."""
    version_compatible: bool
    """Whether TensorRT made them for later versions of itself too."""

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
        layers = _get(data, "layers", list)
        if any(type(count) is not int or count < 1 for count in layers):
            raise ValueError(f"layers {layers!r:.80}: expected whole numbers from 1 up")
        flavour: Any = _get(data, "flavour", str)
        return cls(
            flavour=flavour,
            version=_get(data, "version", str),
            files=tuple(FileRecord.from_json(entry) for entry in _get_objects(data, "files")),
            layers=tuple(layers),
            platform=_get(data, "platform", str),
            gpu=None if data.get("gpu") is None else _get(data, "gpu", str),
            gpu_processors=None if data.get("gpu_processors") is None else _get(data, "gpu_processors", int),
            gpu_memory_bytes=None if data.get("gpu_memory_bytes") is None else _get(data, "gpu_memory_bytes", int),
            compute_capabilities=tuple(_get(data, "compute_capabilities", list)),
            hardware_compatible=_get(data, "hardware_compatible", bool),
            version_compatible=_get(data, "version_compatible", bool),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """What a runtime must know of a compiled policy besides its graph.

    Raises:
        ValueError: the inputs or outputs are not those of a CogACT graph of this configuration, the parts are no chain
            from one to the other, the engines are not those of the parts, two files share a name, `pad_id` is no row of
            the token embedding, or the plan measured fewer decoder layers than it keeps.
    """

    created_by: str
    """Version of evla_compile that wrote the artifact."""
    parts: tuple[Part, ...]
    """The graphs, in the order in which they run."""
    engine: EngineRecord | None
    """Engines built from them, if any were."""
    precision: Precision
    """Dtype of matrix products and attention outside the action head; everything else is float32."""
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
    vocabulary: int
    """Rows of the token embedding: token ids are below it."""
    pad_id: int
    """Token id that fills a prompt up to the text budget."""
    opset: int
    """ONNX opset of the graph."""
    versions: Mapping[str, str]
    """Versions of the libraries that made the artifact, by name."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision {self.precision!r}: expected one of {', '.join(PRECISIONS)}")
        names = [record.name for record in self.files]
        if len(set(names)) != len(names):
            raise ValueError(f"files {names}: expected names that differ")
        if not 1 <= self.vocabulary <= MOST_TOKENS:
            raise ValueError(f"vocabulary {self.vocabulary!s:.20}: expected the rows of the token embedding")
        if not 0 <= self.pad_id < self.vocabulary:
            raise ValueError(f"pad_id {self.pad_id!s:.20}: expected a token id from 0 to {self.vocabulary - 1}")
        measured, last = len(self.plan.layer_importance), self.plan.keep_layers[-1]
        if measured and last >= measured:
            raise ValueError(
                f"layer_importance of {measured} decoder layers, of which the plan keeps layer {last}: expected a value"
                " of every layer, or none"
            )
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
        self._check_chain()
        engine = self.engine
        if engine is not None and not len(engine.files) == len(engine.layers) == len(self.parts):
            raise ValueError(f"{len(engine.files)} engines for {len(self.parts)} parts: expected one for each")

    def _check_chain(self) -> None:
        """Refuse parts of which one takes what nothing in front of it yields."""
        known = {spec.name: spec for spec in self.inputs}
        for part in self.parts:
            for spec in part.inputs:
                if known.get(spec.name) != spec:
                    raise ValueError(f"part {part.name} takes {spec}, which nothing in front of it yields")
            for spec in part.outputs:
                if known.setdefault(spec.name, spec) is not spec:
                    raise ValueError(f"part {part.name} yields {spec.name}, which something in front of it yields too")
        missing = [str(spec) for spec in self.outputs if known.get(spec.name) != spec]
        if missing or not self.parts:
            raise ValueError(f"no part yields {', '.join(missing) or 'anything'}")

    @property
    def files(self) -> tuple[FileRecord, ...]:
        """Every file of the artifact but the manifest."""
        graphs = [record for part in self.parts for record in part.files]
        engines = self.engine.files if self.engine is not None else ()
        return (*graphs, *engines, self.tokenizer, self.report, self.cases)

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
            "parts": [asdict(part) for part in self.parts],
            "engine": None if self.engine is None else asdict(self.engine),
            "precision": self.precision,
            "tokenizer": asdict(self.tokenizer),
            "report": asdict(self.report),
            "cases": asdict(self.cases),
            "inputs": [asdict(spec) for spec in self.inputs],
            "outputs": [asdict(spec) for spec in self.outputs],
            "config": self.config.to_json(),
            "plan": self.plan.to_json(),
            "statistics": {dataset: entry.to_json() for dataset, entry in self.statistics.items()},
            "vocabulary": self.vocabulary,
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
        precision: Any = _get(data, "precision", str)
        return cls(
            created_by=_get(data, "created_by", str),
            parts=tuple(Part.from_json(entry) for entry in _get_objects(data, "parts")),
            engine=None if data.get("engine") is None else EngineRecord.from_json(_get(data, "engine", dict)),
            precision=precision,
            tokenizer=FileRecord.from_json(_get(data, "tokenizer", dict)),
            report=FileRecord.from_json(_get(data, "report", dict)),
            cases=FileRecord.from_json(_get(data, "cases", dict)),
            inputs=tuple(TensorSpec.from_json(entry) for entry in _get_objects(data, "inputs")),
            outputs=tuple(TensorSpec.from_json(entry) for entry in _get_objects(data, "outputs")),
            config=CompileConfig.from_json(_get(data, "config", dict)),
            plan=Plan.from_json(_get(data, "plan", dict)),
            statistics=read_statistics(_get(data, "statistics", dict)),
            vocabulary=_get(data, "vocabulary", int),
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
    path.write_text(to_json_text(manifest.to_json(), indent=1) + "\n", encoding="utf-8")


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
