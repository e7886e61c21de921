"""Run graphs on ONNX Runtime, on the provider that was asked for or not at all."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evla_compile.arguments import whole_number
from evla_compile.artifact.external_data import check_external_data
from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.records import TensorSpec
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.memory import available_memory
from evla_compile.runtime.kernel_cache import prepare_cache
from evla_compile.runtime.onnx_versions import import_onnxruntime, refusal_advice, runtime_errors
from evla_compile.runtime.placement import check_placement, is_refusal, prepare_placement, refusal
from evla_compile.runtime.providers import PROVIDERS, OnnxProvider, is_widened
from evla_compile.runtime.widening import FACTOR, read_widened
from evla_compile.settings.precision import Precision
from evla_compile.units import bytes_text

_DTYPES = {
    "tensor(bool)": "bool",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(float16)": "float16",
    "tensor(float)": "float32",
    "tensor(double)": "float64",
}


logger = logging.getLogger(__name__)


class OnnxSession:
    """An ONNX file, loaded and ready to run.

    Attributes:
        outputs: names of the graph's outputs.
        widened: whether a bfloat16 graph runs in float32 arithmetic: ONNX Runtime has no bfloat16 on a CPU.
    """

    def __init__(
        self,
        model: Path,
        *,
        provider: OnnxProvider,
        threads: int | None,
        mapped: bool,
        weight_bytes: int,
        opset: int,
        precision: Precision,
        cache: Path | None = None,
        allow_cpu: bool = False,
    ) -> None:
        """Load a file; its external data is found beside it.

        Args:
            model: the ONNX file.
            provider: where to compute.
            threads: threads within an operator; None leaves the number to ONNX Runtime.
            mapped: whether weights stay in their file; see `evla_compile.runtime.load`.
            weight_bytes: size of the file and its external data.
            opset: that of the file, which decides on the advice where it is refused.
            precision: that of its products outside the action head.
            cache: folder for the engines and timings of "tensorrt", created if missing; None keeps none.
            allow_cpu: whether operators that the provider does not take may run on the CPU; they are then reported as
                a warning.

        Raises:
            ValueError: `provider`, `threads`, `mapped`, `cache` or `allow_cpu` is out of range.
            EvlaError: ONNX Runtime is not installed, lacks the provider, puts operators on the CPU though the provider
                is another one, or needs more memory than is free.
            ArtifactError: ONNX Runtime refuses the file.
        """
        if provider not in PROVIDERS:
            raise ValueError(f"provider={provider!r}: expected one of {', '.join(PROVIDERS)}")
        if threads is not None:
            threads = whole_number("threads", threads, low=1, otherwise="None")
        if mapped and provider != "cpu":
            raise ValueError(f"mapped=True with provider={provider!r}: expected provider='cpu', which maps files")
        if cache is not None and provider != "tensorrt":
            raise ValueError(f"cache={cache} with provider={provider!r}, which builds nothing worth keeping")
        if allow_cpu and provider == "cpu":
            raise ValueError("allow_cpu=True with provider='cpu', which runs everything there: leave it out")
        self.widened = is_widened(provider, precision)
        if not mapped and provider == "cpu":
            _check_memory(model, FACTOR * weight_bytes if self.widened else weight_bytes)
        self._model = model
        self._session = _open(
            model, provider, threads, cache, opset, mapped=mapped, allow_cpu=allow_cpu, precision=precision
        )
        try:
            self.outputs = tuple(output.name for output in self._session.get_outputs())
            _ = [given.name for given in self._session.get_inputs()]
        except UnicodeDecodeError as error:
            raise ArtifactError(
                f"{model}: a name in it is no UTF-8 text ({error}); compile the policy again"
            ) from error

    def check_signature(self, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...]) -> None:
        """Compare the graph's inputs and outputs with those expected.

        Raises:
            ArtifactError: a name, dtype or shape differs.
        """
        for kind, nodes, specs in (
            ("inputs", self._session.get_inputs(), inputs),
            ("outputs", self._session.get_outputs(), outputs),
        ):
            found = sorted(f"{node.name} {_DTYPES.get(node.type, node.type)}{node.shape}" for node in nodes)
            expected = sorted(map(str, specs))
            if found != expected:
                raise ArtifactError(
                    f"{kind} of the graph are {', '.join(found)}: expected {', '.join(expected)} by the manifest;"
                    " the files are of two compilations, compile the policy again"
                )

    def run(self, feeds: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the graph once: its inputs by name -> its outputs by name.

        Raises:
            EvlaError: ONNX Runtime failed, out of memory for instance.
        """
        try:
            values = self._session.run(None, feeds)
        except runtime_errors() as error:
            raise EvlaError(f"ONNX Runtime failed on {self._model}: {str(error).strip()}") from error
        return dict(zip(self.outputs, values, strict=True))


class OnnxChain:
    """The ONNX files of an artifact, run one after the other; values pass between them through host memory."""

    def __init__(
        self,
        manifest: Manifest,
        folder: Path,
        *,
        provider: OnnxProvider,
        threads: int | None,
        mapped: bool,
        cache: Path | None,
        allow_cpu: bool,
    ) -> None:
        """Load every part and check its signature; see `OnnxSession` for the arguments and errors."""
        self._manifest = manifest
        self.widened = is_widened(provider, manifest.precision)
        if self.widened:
            logger.warning(
                "%s is of bfloat16, which ONNX Runtime does not have on a CPU: it runs in float32 arithmetic, in twice"
                " the memory of its weights, or, mapped, in more time",
                folder,
            )
        sessions = []
        for part in manifest.parts:
            check_external_data(part, folder)
            session = OnnxSession(
                folder / part.model.name,
                provider=provider,
                threads=threads,
                mapped=mapped,
                weight_bytes=sum(record.size for record in part.files),
                opset=manifest.opset,
                precision=manifest.precision,
                cache=cache,
                allow_cpu=allow_cpu,
            )
            session.check_signature(part.inputs, part.outputs)
            sessions.append(session)
        self._sessions = tuple(sessions)

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the chain once: the policy's inputs by name -> its outputs by name.

        Raises:
            EvlaError: ONNX Runtime failed, or the chain is closed.
        """
        sessions = self._sessions  # another thread may close the chain
        if not sessions:
            raise EvlaError("this policy is closed: load it again")
        values = dict(feeds)
        for part, session in zip(self._manifest.parts, sessions, strict=True):
            values |= session.run({spec.name: values[spec.name] for spec in part.inputs})
        return {spec.name: values[spec.name] for spec in self._manifest.outputs}

    def close(self) -> None:
        """Release the sessions."""
        self._sessions = ()


def _check_memory(model: Path, weight_bytes: int) -> None:
    free = available_memory()
    if free is not None and weight_bytes > free:
        raise EvlaError(
            f"{model} has {bytes_text(weight_bytes)} of weights, which ONNX Runtime copies, and {bytes_text(free)} of"
            " memory are free: load it with mapped=True (evla run --mapped), or on a machine with more"
        )


def _provider_list(provider: OnnxProvider, cache: Path | None) -> list[tuple[str, dict[str, str]]]:
    """Return the providers to ask for, in order; operators that TensorRT does not take run on CUDA."""
    asked = PROVIDERS[provider]
    options = dict(asked.options)
    if provider == "tensorrt" and cache is not None:
        prepare_cache(cache)
        kept = ("trt_engine_cache", "trt_timing_cache")
        for name in kept:
            options |= {f"{name}_enable": "1", f"{name}_path": str(cache)}
    behind = [] if asked.behind is None else [PROVIDERS[asked.behind]]
    return [(asked.name, options), *((other.name, dict(other.options)) for other in behind)]


def _advice(provider: OnnxProvider, precision: Precision) -> str:
    """Return advice for a graph that a provider may have refused for its precision; else an empty string."""
    if provider == "cpu" or precision == "float32":
        return ""
    return (
        f"it is of {precision}, which {provider} may lack: take provider='cpu', an engine (evla build), another"
        " precision=, or a newer ONNX Runtime"
    )


def _open(
    model: Path,
    provider: OnnxProvider,
    threads: int | None,
    cache: Path | None,
    opset: int,
    *,
    mapped: bool,
    allow_cpu: bool,
    precision: Precision,
) -> Any:
    asked = PROVIDERS[provider]
    onnxruntime = import_onnxruntime(asked.remedy)
    wanted, available = asked.name, onnxruntime.get_available_providers()
    if wanted not in available:
        raise EvlaError(
            f"provider={provider!r}: expected {wanted}, but ONNX Runtime {onnxruntime.__version__} offers"
            f" {', '.join(available)}: remove every onnxruntime package, then {asked.remedy}"
        )
    options = onnxruntime.SessionOptions()
    if threads is not None:
        options.intra_op_num_threads = threads
    if mapped:
        options.add_session_config_entry("session.disable_prepacking", "1")
    disabled = list(asked.disabled_optimizers)
    source: Path | bytes = model
    if is_widened(provider, precision):
        source, folder = read_widened(model)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if mapped:
            disabled.append("ConstantFolding")  # folded, every weight would be in memory as float32
    if provider != "cpu":
        prepare_placement(options, onnxruntime, allow_cpu=allow_cpu)
    try:
        # Without enable_fallback=0 a provider that fails, now or in a run, is silently replaced by the CPU.
        session = onnxruntime.InferenceSession(
            source,
            options,
            providers=_provider_list(provider, cache),
            enable_fallback=0,
            disabled_optimizers=disabled,
        )
    except runtime_errors() as error:
        if is_refusal(error):
            raise EvlaError(refusal(model, provider, onnxruntime)) from error
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {model}: {str(error).strip()};"
            f" {_advice(provider, precision) or refusal_advice(onnxruntime.__version__, opset, asked.package)}"
        ) from error
    taken = session.get_providers()
    if taken[0] != wanted:
        raise EvlaError(
            f"provider={provider!r}: expected {wanted}, but ONNX Runtime {onnxruntime.__version__} took"
            f" {', '.join(taken)}; its log says why: most often CUDA or cuDNN is missing or of another version"
        )
    if provider != "cpu":
        check_placement(session, model, provider, onnxruntime, allow_cpu=allow_cpu)
    return session
