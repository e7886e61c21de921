"""An exported policy, ready to run: the graph on ONNX Runtime between the host's two halves.

Shape legend: B batch, S image side in pixels, T text budget, A action steps, F action dimensions.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evla_compile import host
from evla_compile.artifact import check_files, find_manifest
from evla_compile.errors import ArtifactError, CheckpointError
from evla_compile.host import Predictor
from evla_compile.manifest import Manifest, read_manifest
from evla_compile.processor import Processor
from evla_compile.runtime.onnx_session import OnnxSession, Provider


class RuntimePolicy(Predictor):
    """A compiled policy whose graph has been loaded; made by `load`.

    Attributes:
        manifest: what the artifact says of itself.
        config: settings of the compilation.
        processor: host-side tokenizer, image preparation and action statistics.
    """

    def __init__(self, session: OnnxSession, manifest: Manifest, processor: Processor) -> None:
        self.manifest = manifest
        self.config = manifest.config
        self.processor = processor
        self._session = session

    @property
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that the graph takes, (B, A, F)."""
        return self.manifest.noise_shape

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
        """Return every output of the graph by name: `samples`, and whatever else it was exported with.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B], real tokens of each row, from 2 to T.
            noise: float32 [B,A,F].

        Raises:
            ValueError: an argument has another dtype or shape, or a text length is out of range.
        """
        feeds: dict[str, NDArray[Any]] = {
            "image": image,
            "input_ids": input_ids,
            "text_length": text_length,
            "noise": noise,
        }
        for spec in self.manifest.inputs:
            host.check_input(spec.name, feeds[spec.name], dtype=spec.dtype, shape=spec.shape)
        host.check_text_length(text_length, self.config.text_tokens)
        return self._session.run(feeds)


def load(
    path: str | os.PathLike[str],
    provider: Provider = "cpu",
    threads: int | None = None,
    check_hashes: bool = True,
    *,
    mapped: bool = False,
) -> RuntimePolicy:
    """Load an exported policy; imports neither torch nor transformers.

    Args:
        path: an artifact's folder, an `.onnx` file with its manifest beside it, or that manifest.
        provider: "cpu", or "cuda" with onnxruntime-gpu. Operators that have no CUDA kernel still run on the CPU.
        threads: threads within an operator on the CPU; None leaves the number to ONNX Runtime.
        check_hashes: whether to read every file through for its SHA-256 first.
        mapped: leave the weights in their file, mapped, instead of copying them into the layout that the CPU likes
            best: runs a policy larger than memory, loads at once, and makes every call slower. On the CPU only.

    Raises:
        ArtifactError: the artifact is missing, damaged, or not what its manifest says.
        EvlaError: ONNX Runtime is not installed, cannot compute where it was asked to, or needs more memory than is
            free.
        ValueError: `provider`, `threads` or `mapped` is out of range.
    """
    place = find_manifest(path)
    manifest = read_manifest(place)
    check_files(manifest, place.parent, hashes=check_hashes)
    processor = _read_processor(manifest, place.with_name(manifest.tokenizer.name))
    weight_bytes = sum(record.size for record in (manifest.model, *manifest.data))
    model = place.with_name(manifest.model.name)
    session = OnnxSession(model, provider=provider, threads=threads, mapped=mapped, weight_bytes=weight_bytes)
    session.check_signature(manifest.inputs, manifest.outputs)
    return RuntimePolicy(session, manifest, processor)


def _read_processor(manifest: Manifest, tokenizer: Path) -> Processor:
    try:
        return Processor(
            tokenizer_json=tokenizer.read_text(encoding="utf-8"),
            statistics=manifest.statistics,
            image_side=manifest.image_side,
            pad_id=manifest.pad_id,
        )
    except (UnicodeDecodeError, CheckpointError) as error:
        raise ArtifactError(f"tokenizer {tokenizer}: {error}; compile the policy again") from error
