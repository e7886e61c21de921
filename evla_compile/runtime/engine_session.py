"""Run the engines of an artifact by TensorRT or TensorRT-RTX: buffers, copies, an optional CUDA graph; no torch."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.records import EngineRecord, Part, TensorSpec
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.host.inputs import GraphInputs
from evla_compile.runtime.engine_match import check_match, rebuild, require_engine
from evla_compile.runtime.engine_resources import EngineResources
from evla_compile.runtime.kernel_cache import KernelCache, prepare_cache
from evla_compile.settings.engine_settings import FLAVOUR_NAMES
from evla_compile.tensorrt.cuda import Cuda, find_gpu
from evla_compile.tensorrt.library import create, describe_tensor, import_flavour, make_logger, reasons


class EngineSession:
    """The engines of an artifact, loaded and ready to run.

    Tensors that pass from one engine to the next stay on the GPU. Inputs and outputs of the policy go through pinned
    host memory, in the stream of the engines. With a CUDA graph, the whole call, copies included, is recorded when the
    engines are loaded, and each call is one launch. Threads may share a session: it runs one call at a time.
    """

    widened = False
    """Engines compute in the precision of their graphs."""

    def __init__(self, place: Path, manifest: Manifest, *, cuda_graph: bool = False, cache: Path | None = None) -> None:
        """Load the engines.

        Args:
            place: path of the artifact's manifest; the engines are beside it.
            manifest: its contents.
            cuda_graph: whether to launch each call as one CUDA graph; the engines then run once while they are loaded.
            cache: folder in which TensorRT-RTX keeps the kernels that it compiles for this GPU, created if missing;
                None keeps none.

        Raises:
            ArtifactError: the artifact has no engine, one for another GPU, version or platform, or a damaged one; the
                message has the command that builds it.
            EvlaError: the library or cuda-bindings is missing, there is no GPU, CUDA fails, the engines cannot be
                captured in a graph, or the cache cannot be used.
            ValueError: `cache` with TensorRT, which compiles when it builds.
        """
        record = require_engine(manifest, place)
        if cache is not None and record.flavour != "tensorrt_rtx":
            raise ValueError(f"cache={cache} with {FLAVOUR_NAMES[record.flavour]}, which compiles when it builds")
        trt = import_flavour(record.flavour)
        check_match(record, trt.__version__, find_gpu(), place)
        if cache is not None:
            prepare_cache(cache)
        self._manifest = manifest
        self._resources = EngineResources(Cuda())
        # It also runs at exit: a CUDA graph that outlives its contexts would hang the process.
        self.close = weakref.finalize(self, self._resources.release)
        try:
            self._load(trt, place, record, cache)
            if cuda_graph:
                self._capture()
        except BaseException:
            with suppress(EvlaError):  # the first error is the one to report
                self.close()
            raise

    def _load(self, trt: Any, place: Path, record: EngineRecord, cache: Path | None) -> None:
        resources = self._resources
        log = make_logger(trt)
        resources.runtime = create(trt.Runtime, log)
        # A version-compatible engine contains host code, which runs in this process: allow it for such engines alone.
        resources.runtime.engine_host_code_allowed = record.version_compatible
        resources.stream = resources.cuda.create_stream()
        caches = [None if cache is None else cache / f"{file.name}.kernels" for file in record.files]
        for file, kernels in zip(record.files, caches, strict=True):
            engine = resources.runtime.deserialize_cuda_engine(place.with_name(file.name).read_bytes())
            if engine is None:
                raise ArtifactError(
                    f"{place.with_name(file.name)} cannot be loaded by {FLAVOUR_NAMES[record.flavour]}:"
                    f" {reasons(log.errors)}; {rebuild(record, place)}"
                )
            resources.engines.append(engine)
            resources.contexts.append(_create_context(engine, kernels, resources))
        for part, engine in zip(self._manifest.parts, resources.engines, strict=True):
            _check_signature(engine, (*part.inputs, *part.outputs), part.name, rebuild(record, place))
        resources.allocate(self._manifest.parts, (*self._manifest.inputs, *self._manifest.outputs))
        for part, context in zip(self._manifest.parts, resources.contexts, strict=True):
            _bind(context, part, resources)

    def _capture(self) -> None:
        """Record a call as a CUDA graph, after a call that runs: the library's first-call set-up cannot be recorded."""
        resources = self._resources
        if not all(_can_capture(context, resources.stream) for context in resources.contexts):
            raise EvlaError("cuda_graph=True: an engine of this artifact cannot be captured; load it without")
        for name, array in GraphInputs.blank(self._manifest.signature).by_name.items():
            resources.arrays[name][...] = array
        self._enqueue()
        resources.cuda.synchronize(resources.stream)
        try:
            with resources.cuda.capturing(resources.stream) as recording:
                self._enqueue()
            resources.graph = resources.cuda.instantiate(recording)
        except EvlaError as error:
            raise EvlaError(f"cuda_graph=True: the engines cannot be captured ({error}); load them without") from error

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engines once: the policy's inputs by name -> its outputs by name, in new arrays.

        Raises:
            EvlaError: TensorRT or CUDA failed, or the session is closed.
        """
        resources = self._resources
        with resources.lock:
            if not resources.contexts:
                raise EvlaError("this policy is closed: load it again")
            for spec in self._manifest.inputs:
                resources.arrays[spec.name][...] = feeds[spec.name]
            try:
                if resources.graph is None:
                    self._enqueue()
                else:
                    resources.cuda.launch(resources.graph, resources.stream)
                resources.cuda.synchronize(resources.stream)
            except BaseException:
                resources.drain()  # the next call writes into buffers that an earlier engine may still read
                raise
            return {spec.name: resources.arrays[spec.name].copy() for spec in self._manifest.outputs}

    def _enqueue(self) -> None:
        """Enqueue a whole call in the stream."""
        resources = self._resources
        read = {spec.name for part in self._manifest.parts for spec in part.inputs}
        for spec in self._manifest.inputs:
            if spec.name in read:
                resources.cuda.copy_in(resources.buffers[spec.name], resources.arrays[spec.name], resources.stream)
        for part, context in zip(self._manifest.parts, resources.contexts, strict=True):
            if not context.execute_async_v3(int(resources.stream)):
                raise EvlaError(f"TensorRT failed to run {part.name}")
        for spec in self._manifest.outputs:
            resources.cuda.copy_out(resources.arrays[spec.name], resources.buffers[spec.name], resources.stream)


def _create_context(engine: Any, kernels: Path | None, resources: EngineResources) -> Any:
    if kernels is None:
        context = engine.create_execution_context()
    else:
        settings = engine.create_runtime_config()
        if settings is None:
            raise EvlaError("TensorRT-RTX gives no runtime configuration: load the policy without cache=")
        cache = KernelCache(settings, kernels)
        context = engine.create_execution_context(settings)
        resources.kernels.append(cache)
    if context is None:
        raise EvlaError("TensorRT cannot create an execution context: most often GPU memory is short")
    return context


def _bind(context: Any, part: Part, resources: EngineResources) -> None:
    for spec in (*part.inputs, *part.outputs):
        if not context.set_tensor_address(spec.name, resources.buffers[spec.name]):
            raise EvlaError(f"TensorRT does not take the buffer of {spec} for {part.name}: build the engine again")


def _can_capture(context: Any, stream: Any) -> bool:
    """Tell whether a context can be captured; only TensorRT-RTX has contexts that cannot, and says so."""
    ask = getattr(context, "is_stream_capturable", None)
    return ask is None or bool(ask(int(stream)))


def _check_signature(engine: Any, expected: Sequence[TensorSpec], part: str, advice: str) -> None:
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    found = [describe_tensor(name, engine.get_tensor_dtype(name), engine.get_tensor_shape(name)) for name in names]
    if sorted(found) != sorted(map(str, expected)):
        raise ArtifactError(
            f"the engine of {part} has the tensors {', '.join(found)}: expected {', '.join(map(str, expected))} by the"
            f" manifest; {advice}"
        )
