"""Load and run an exported policy: its graphs on ONNX Runtime or TensorRT, and pre- and post-processing on the host.

Shape legend: B batch, S image side in pixels, T text budget, A action steps, F action dimensions.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, Self, get_args

import numpy as np
from numpy.typing import NDArray

from evla_compile.artifact.files import check_files, find_manifest
from evla_compile.artifact.hub import local_artifact
from evla_compile.artifact.manifest import Manifest, read_manifest
from evla_compile.artifact.records import FileRecord
from evla_compile.errors import ArtifactError, CheckpointError, EvlaError
from evla_compile.host.camera_frame import CameraFrame, Framing
from evla_compile.host.inputs import GraphInputs, InputSignature
from evla_compile.host.predictor import Predictor
from evla_compile.host.processor import Processor
from evla_compile.json_text import to_json_text
from evla_compile.runtime.engine_match import require_engine
from evla_compile.runtime.engine_session import EngineSession
from evla_compile.runtime.latency import LatencyCounter
from evla_compile.runtime.onnx_session import OnnxChain
from evla_compile.runtime.providers import Provider


class Session(Protocol):
    """A loaded chain of graphs."""

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the chain once: the policy's inputs by name -> its outputs by name."""

    def close(self) -> object:
        """Release all resources; the session cannot run any more."""

    @property
    def widened(self) -> bool:
        """Whether a bfloat16 policy runs in float32 arithmetic."""


class RuntimePolicy(Predictor):
    """A compiled policy whose graphs have been loaded; `load` returns it.

    A `with` block closes it at its end. A pickle contains the path and the settings of `load` alone, so that
    unpickling, in a worker process for instance, loads the artifact again; so does copying.

    Attributes:
        manifest: the artifact's manifest.
        config: settings of the compilation.
        processor: host-side tokenizer, image preparation and action statistics.
        latency: how long its calls took.
    """

    def __init__(
        self, session: Session, manifest: Manifest, processor: Processor, source: Mapping[str, Any] | None = None
    ) -> None:
        """Take a loaded session.

        Args:
            session: the graphs.
            manifest: the artifact's manifest.
            processor: pre- and post-processing on the host.
            source: arguments of `load` that load the same policy again; None for one that cannot be pickled or copied.
        """
        self.manifest = manifest
        self.config = manifest.config
        self.processor = processor
        self.latency = LatencyCounter()
        self._session = session
        self._source = source
        self._closed = False

    def close(self) -> None:
        """Release memory, on the GPU above all; the policy cannot run any more. It happens at exit anyway.

        Closing twice does nothing.

        Raises:
            EvlaError: the kernels for `cache` cannot be written, or CUDA fails.
        """
        if not self._closed:
            self._closed = True
            self._session.close()

    def __enter__(self) -> Self:
        self._refuse_closed()
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        self._refuse_closed()
        if self._source is None:
            raise EvlaError("this policy was not loaded by evla_compile.runtime.load: load it where it is needed")
        return _load_again, (dict(self._source), _fingerprint(self.manifest))

    def _refuse_closed(self) -> None:
        if self._closed:
            raise EvlaError("this policy is closed: load it again")

    @property
    def widened(self) -> bool:
        """Whether this is a bfloat16 policy that runs in float32 arithmetic, as on a CPU."""
        return self._session.widened

    @property
    def signature(self) -> InputSignature:
        """Sizes of the graph's inputs."""
        return self.manifest.signature

    def sample(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return the graph's raw samples, float32 [B,A,F]; see `outputs`."""
        return self.outputs(image, input_ids, text_length, noise)["samples"]

    def outputs(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
    ) -> dict[str, NDArray[Any]]:
        """Return every output of the graph by name: `samples`, and the stages that were exported as outputs.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B], real tokens of each row, from 2 to T.
            noise: float32 [B,A,F].

        Raises:
            EvlaError: the policy is closed, or computing failed.
            ValueError: an argument has another dtype or shape, or a token id or text length is out of range.
        """
        self._refuse_closed()
        inputs = GraphInputs(image=image, input_ids=input_ids, text_length=text_length, noise=noise)
        inputs.check(self.signature)
        with self.latency.timing("graph"):
            return self._session.run(inputs.by_name)

    def predict_action(
        self,
        image: CameraFrame | Sequence[CameraFrame],
        instruction: str | Sequence[str],
        unnorm_key: str | None = None,
        noise: NDArray[np.floating] | None = None,
        seed: int | None = None,
        *,
        framing: Framing = "whole",
    ) -> NDArray[np.float64]:
        """Return the action chunk for a camera frame and an instruction; see `Predictor.predict_action`."""
        self._refuse_closed()
        with self.latency.timing("call"):
            return super().predict_action(image, instruction, unnorm_key, noise, seed, framing=framing)


def load(
    path: str | os.PathLike[str],
    provider: Provider | None = None,
    threads: int | None = None,
    check_hashes: bool = True,
    *,
    mapped: bool = False,
    cuda_graph: bool = False,
    cache: str | os.PathLike[str] | None = None,
    allow_cpu: bool = False,
) -> RuntimePolicy:
    """Load an exported policy; imports neither torch nor transformers.

    Args:
        path: an artifact's folder, an `.onnx` or `.engine` file with its manifest beside it, that manifest, or the id
            of a Hugging Face repository with an artifact's folder, such as "ORG/NAME": it is downloaded once.
        provider: "engine" for the TensorRT engine in the artifact; or ONNX Runtime on the "cpu", with onnxruntime-gpu
            on "cuda" or "tensorrt", with onnxruntime-openvino on "openvino" (a CPU's). None is "engine" for an
            `.engine` file and "cpu" for all else. Where it cannot compute there is an error, never another provider.
            On the "cpu" a bfloat16 policy runs in float32 arithmetic (`RuntimePolicy.widened`), for which the package
            onnx must be installed.
        threads: threads within an operator on the CPU; None leaves the number to ONNX Runtime.
        check_hashes: whether to read every file through for its SHA-256 first.
        mapped: leave the weights in their file, mapped into memory, instead of copying them into the layout that is
            fastest on the CPU: a policy may then be larger than memory, loads at once, and every call is slower. On the
            CPU only.
        allow_cpu: whether ONNX Runtime may run on the CPU the operators that another provider does not take; each is
            named in a warning. Otherwise they are an error that names them.
        cuda_graph: whether to launch each call of an engine as one CUDA graph, captured while the policy is loaded.
        cache: folder for what is built at load time: engines and timings of "tensorrt", kernels of a TensorRT-RTX
            engine; created if missing; None keeps nothing.

    Raises:
        ArtifactError: the artifact is missing, damaged, or differs from its manifest, or its engine is for another
            machine.
        EvlaError: a library is not installed, cannot compute where it was asked to, or needs more memory than is free.
        ValueError: a setting is out of range, or one that the provider does not have.
    """
    chosen = provider or ("engine" if Path(path).suffix == ".engine" else "cpu")
    if chosen not in get_args(Provider):
        raise ValueError(f"provider={provider!r}: expected one of {', '.join(get_args(Provider))}")
    if cuda_graph and chosen != "engine":
        raise ValueError(f"cuda_graph=True with provider={chosen!r}: expected provider='engine'")
    if chosen == "engine" and (mapped or threads is not None or allow_cpu):
        raise ValueError("mapped=, threads= and allow_cpu= are for ONNX Runtime: leave them out with an engine")
    place = find_manifest(local_artifact(path, lambda manifest: _needed(manifest, Path(path), chosen)))
    manifest = read_manifest(place)
    check_files(_needed(manifest, place, chosen), place.parent, hashes=check_hashes)
    processor = _read_processor(manifest, place.with_name(manifest.tokenizer.name))
    kept = None if cache is None else Path(cache)
    source = {
        "path": str(place.absolute()),
        "provider": chosen,
        "threads": threads,
        "check_hashes": check_hashes,
        "mapped": mapped,
        "cuda_graph": cuda_graph,
        "cache": None if kept is None else str(kept.absolute()),
        "allow_cpu": allow_cpu,
    }
    session: Session
    if chosen == "engine":
        session = EngineSession(place, manifest, cuda_graph=cuda_graph, cache=kept)
    else:
        session = OnnxChain(
            manifest, place.parent, provider=chosen, threads=threads, mapped=mapped, cache=kept, allow_cpu=allow_cpu
        )
    return RuntimePolicy(session, manifest, processor, source)


def _load_again(source: Mapping[str, Any], fingerprint: str) -> RuntimePolicy:
    """Load the policy of a pickle; an ArtifactError says that another artifact is in its place by now."""
    policy = load(**source)
    if _fingerprint(policy.manifest) != fingerprint:
        policy.close()
        raise ArtifactError(
            f"{source['path']} is of another artifact than the pickled policy was loaded from: load the new one with"
            " evla_compile.runtime.load, or put the former one back"
        )
    return policy


def _fingerprint(manifest: Manifest) -> str:
    return hashlib.sha256(to_json_text(manifest.to_json(), sort_keys=True).encode()).hexdigest()


def _needed(manifest: Manifest, place: Path, provider: Provider) -> tuple[FileRecord, ...]:
    """Return the files that a provider reads: a robot needs no graphs beside its engines."""
    if provider == "engine":
        return (*require_engine(manifest, place).files, manifest.tokenizer)
    engines = manifest.engine.files if manifest.engine is not None else ()
    return tuple(record for record in manifest.files if record not in engines)


def _read_processor(manifest: Manifest, tokenizer: Path) -> Processor:
    try:
        processor = Processor(
            tokenizer_json=tokenizer.read_text(encoding="utf-8"),
            statistics=manifest.statistics,
            image_side=manifest.signature.image_side,
            pad_id=manifest.pad_id,
        )
    except (UnicodeDecodeError, CheckpointError) as error:
        raise ArtifactError(f"tokenizer {tokenizer}: {error}; compile the policy again") from error
    if processor.largest_id >= manifest.vocabulary:
        raise ArtifactError(
            f"tokenizer {tokenizer}: it has ids up to {processor.largest_id}, and the policy's embedding has"
            f" {manifest.vocabulary} rows by the manifest; compile the policy again"
        )
    return processor
