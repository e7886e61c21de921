"""The manifest of an artifact: what a runtime must know of a compiled policy besides its graph; no torch.

A manifest may come from anywhere, so nothing in it is used before it is checked.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from evla_compile.artifact.fields import objects_at, value_at
from evla_compile.artifact.records import EngineRecord, FileRecord, Part, TensorSpec
from evla_compile.errors import ArtifactError, CalibrationError, CheckpointError
from evla_compile.host.inputs import InputSignature
from evla_compile.host.processor import ActionStatistics, read_statistics
from evla_compile.json_text import to_json_text
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan
from evla_compile.settings.precision import PRECISIONS, Precision

FORMAT = "evla_compile/5"
"""Version of the manifest's layout; another one is refused."""
MOST_TOKENS = 2**31 - 1
"""Rows of a token embedding, at most: more than any model has, and within the index type of every runtime."""

_INPUT_FORMS = [(form.name, form.dtype, len(form.axes)) for form in COGACT.inputs]


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
    tensors: FileRecord | None = None
    """Weights that calibration has refit, so that the policy can be compiled again by its plan; None without any."""
    cases: FileRecord
    """Calls of the torch graph, recorded to verify a runtime with."""
    inputs: tuple[TensorSpec, ...]
    """image [B,S,S,3], input_ids [B,T], text_length [B] and noise [B,A,F], in this order."""
    outputs: tuple[TensorSpec, ...]
    """samples [B,A,F], then the stages that were exported as outputs."""
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
    """Versions of the libraries that the artifact was written with, by name."""

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
        held = None if self.tensors is None else (self.tensors.sha256, self.tensors.size)
        named = None if self.plan.tensor_file is None else (self.plan.tensor_file.sha256, self.plan.tensor_file.size)
        if held != named:
            raise ValueError(f"the file of the plan's tensors is {self.tensors}: expected that of {named}")
        forms = [(spec.name, spec.dtype, len(spec.shape)) for spec in self.inputs]
        if forms != _INPUT_FORMS:
            raise ValueError(f"inputs are {forms} as (name, dtype, rank): expected {_INPUT_FORMS}")
        expected = list(self.signature.shapes.values())
        if [spec.shape for spec in self.inputs] != expected:
            raise ValueError(f"shapes of {', '.join(map(str, self.inputs))}: expected {expected} by the configuration")
        samples = TensorSpec(name="samples", dtype="float32", shape=self.signature.noise_shape)
        outputs = {spec.name: spec for spec in self.outputs}
        if outputs.get("samples") != samples or len(outputs) != len(self.outputs):
            raise ValueError(f"outputs {', '.join(map(str, self.outputs))}: expected {samples} among names that differ")
        self._check_chain()
        engine = self.engine
        if engine is not None and not len(engine.files) == len(engine.layers) == len(self.parts):
            raise ValueError(f"{len(engine.files)} engines for {len(self.parts)} parts: expected one for each")

    def _check_chain(self) -> None:
        """Refuse a part with an input that is neither the policy's nor an output of an earlier part."""
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
        tensors = () if self.tensors is None else (self.tensors,)
        return (*graphs, *engines, self.tokenizer, self.report, *tensors, self.cases)

    @property
    def signature(self) -> InputSignature:
        """Sizes of the graph's inputs: from the configuration where it has them, else from the inputs themselves."""
        image, *_, noise = (spec.shape for spec in self.inputs)
        return InputSignature(
            batch_size=self.config.batch_size,
            image_side=image[1],
            text_tokens=self.config.text_tokens,
            chunk=noise[1],
            action_width=noise[2],
            vocabulary=self.vocabulary,
        )

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
            "tensors": None if self.tensors is None else asdict(self.tensors),
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
        if value_at(data, "format", str) != FORMAT:
            raise ValueError(f"'format' is {data['format']!r}, but this version of evla_compile reads {FORMAT!r}")
        versions = value_at(data, "versions", dict)
        precision: Any = value_at(data, "precision", str)
        return cls(
            created_by=value_at(data, "created_by", str),
            parts=tuple(Part.from_json(entry) for entry in objects_at(data, "parts")),
            engine=None if data.get("engine") is None else EngineRecord.from_json(value_at(data, "engine", dict)),
            precision=precision,
            tokenizer=FileRecord.from_json(value_at(data, "tokenizer", dict)),
            report=FileRecord.from_json(value_at(data, "report", dict)),
            tensors=None if data.get("tensors") is None else FileRecord.from_json(value_at(data, "tensors", dict)),
            cases=FileRecord.from_json(value_at(data, "cases", dict)),
            inputs=tuple(TensorSpec.from_json(entry) for entry in objects_at(data, "inputs")),
            outputs=tuple(TensorSpec.from_json(entry) for entry in objects_at(data, "outputs")),
            config=CompileConfig.from_json(value_at(data, "config", dict)),
            plan=Plan.from_json(value_at(data, "plan", dict)),
            statistics=read_statistics(value_at(data, "statistics", dict)),
            vocabulary=value_at(data, "vocabulary", int),
            pad_id=value_at(data, "pad_id", int),
            opset=value_at(data, "opset", int),
            versions={library: value_at(versions, library, str) for library in versions},
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
