"""Run an artifact's ONNX graphs on a CPU with their stages as outputs, always in float32 arithmetic."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx
from numpy.typing import NDArray
from onnx import helper

from evla_compile.artifact.cases import RecordedCase
from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.replay import replay
from evla_compile.errors import ArtifactError, VerificationError
from evla_compile.host.inputs import GraphInputs
from evla_compile.runtime.linked_weights import follow_links
from evla_compile.runtime.onnx_versions import import_onnxruntime, refusal_advice, runtime_errors
from evla_compile.runtime.providers import PROVIDERS
from evla_compile.runtime.widening import widen


class StageRun:
    """The graphs of an artifact, loaded with every recorded stage as an output.

    ONNX Runtime's CPU provider has no bfloat16 arithmetic, so a bfloat16 graph is widened: its weights are cast to
    float32, which is exact, and all operators are float32. So the rounding of activations to bfloat16 is not tested.
    """

    def __init__(self, manifest: Manifest, folder: Path, stages: Sequence[str], *, threads: int | None) -> None:
        """Load the graphs.

        Args:
            manifest: that of the artifact.
            folder: folder of its files.
            stages: values to return beside the outputs, by their names in the graphs.
            threads: threads of ONNX Runtime; None leaves the number to it.

        Raises:
            ArtifactError: ONNX Runtime refuses a graph.
            VerificationError: no graph has one of the stages.
        """
        self._parts, self._sessions, self._folder = manifest.parts, [], folder
        missing = set(stages)
        for part in manifest.parts:
            model = onnx.load(str(folder / part.model.name), load_external_data=False)
            known = {output.name for output in model.graph.output}
            here = [name for node in model.graph.node for name in node.output if name in missing and name not in known]
            model.graph.output.extend(map(helper.make_empty_tensor_value_info, here))
            missing -= known | set(here)
            widen(model)
            self._sessions.append(_open(model, folder / part.model.name, manifest.opset, threads))
        if missing:
            raise VerificationError(f"{folder}: no graph has the recorded stages {', '.join(sorted(missing))}")

    def run(self, inputs: GraphInputs) -> dict[str, NDArray[Any]]:
        """Return every output and stage by name.

        Raises:
            VerificationError: ONNX Runtime failed.
        """
        given = inputs.by_name
        values = dict(given)
        for part, session in zip(self._parts, self._sessions, strict=True):
            names = [output.name for output in session.get_outputs()]
            try:
                found = session.run(names, {spec.name: values[spec.name] for spec in part.inputs})
            except runtime_errors() as error:
                file = self._folder / part.model.name
                raise VerificationError(f"ONNX Runtime failed on {file}: {str(error).strip()}") from error
            values |= zip(names, found, strict=True)
        return {name: value for name, value in values.items() if name not in given}


def replay_graphs(
    what: str, manifest: Manifest, folder: Path, cases: Sequence[RecordedCase], *, threads: int | None = None
) -> dict[str, float]:
    """Compare the graphs of an artifact with recorded cases, stage by stage; both exports and `verify` call this.

    Args:
        what: what is run, for messages.
        manifest: that of the artifact.
        folder: folder of its files.
        cases: what was recorded.
        threads: threads of ONNX Runtime; None leaves the number to it.

    Returns:
        Relative error by stage, in data-flow order; the worst case.

    Raises:
        ArtifactError: ONNX Runtime refuses a graph.
        VerificationError: a stage leaves the tolerance of the artifact's precision; see `replay`.
    """
    graphs = StageRun(manifest, folder, tuple(cases[0].stages), threads=threads)
    precision, text_tokens = manifest.precision, manifest.config.text_tokens
    return replay(f"{what} on ONNX Runtime", graphs.run, cases, precision=precision, text_tokens=text_tokens)


def _open(model: onnx.ModelProto, file: Path, opset: int, threads: int | None) -> Any:
    onnxruntime = import_onnxruntime(PROVIDERS["cpu"].remedy)
    folder = follow_links(model, file.parent)
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    # Nothing is copied or computed in advance: there are few calls, and the policy may be larger than memory.
    options.add_session_config_entry("session.disable_prepacking", "1")
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(),
            options,
            providers=["CPUExecutionProvider"],
            disabled_optimizers=["ConstantFolding", "MatMulAddFusion"],
        )
    except runtime_errors() as error:
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file}: {str(error).strip()};"
            f" {refusal_advice(onnxruntime.__version__, opset)}"
        ) from error
