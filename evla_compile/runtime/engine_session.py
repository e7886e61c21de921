"""The engines of an artifact, run by TensorRT or TensorRT-RTX: buffers, copies and an optional CUDA graph; no torch."""

import weakref
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evla_compile.engine_settings import FLAVOUR_NAMES
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.manifest import EngineRecord, Manifest, TensorSpec
from evla_compile.runtime.cuda import Cuda, find_gpu
from evla_compile.runtime.engine_match import check_match, rebuild, require_engine
from evla_compile.tensorrt_library import describe_tensor, import_flavour, make_logger


class EngineSession:
    """The engines of an artifact, loaded and ready to run.

    Every tensor that is handed from one engine to the next stays on the GPU. Inputs and outputs of the policy go
    through pinned host memory, in one stream with the engines. With a CUDA graph the whole call, copies included, is
    recorded once and then launched as one piece of work.
    """

    def __init__(self, place: Path, manifest: Manifest, *, cuda_graph: bool = False, cache: Path | None = None) -> None:
        """Load the engines.

        Args:
            place: the artifact's manifest; the engines lie beside it.
            manifest: what it says.
            cuda_graph: whether to launch each call as one CUDA graph.
            cache: folder in which TensorRT-RTX keeps the kernels that it compiles for this GPU; None for nowhere.

        Raises:
            ArtifactError: the artifact has no engine, one for another GPU, version or platform, or a damaged one; the
                message has the command that builds it.
            EvlaError: the library or cuda-bindings is missing, there is no GPU, or CUDA fails.
            ValueError: `cache` with TensorRT, which compiles when it builds.
        """
        record = require_engine(manifest, place)
        if cache is not None and record.flavour != "tensorrt_rtx":
            raise ValueError(f"cache={cache} with {FLAVOUR_NAMES[record.flavour]}, which compiles when it builds")
        trt = import_flavour(record.flavour)
        check_match(record, trt.__version__, find_gpu(), place)
        self._manifest, self._cuda_graph = manifest, cuda_graph
        self._held = _Held(Cuda())
        # Runs before the interpreter ends too: a graph that outlives its contexts hangs the process.
        self.close = weakref.finalize(self, self._held.release)
        try:
            self._load(trt, place, record, cache)
        except BaseException:
            self.close()
            raise

    def _load(self, trt: Any, place: Path, record: EngineRecord, cache: Path | None) -> None:
        held = self._held
        said = make_logger(trt)
        held.runtime = trt.Runtime(said)
        held.stream = held.cuda.create_stream()
        caches = [None if cache is None else cache / f"{file.name}.kernels" for file in record.files]
        for file, kernels in zip(record.files, caches, strict=True):
            engine = held.runtime.deserialize_cuda_engine(place.with_name(file.name).read_bytes())
            if engine is None:
                reasons = " / ".join(said.errors[:3]) or "it gave no reason"
                raise ArtifactError(
                    f"{place.with_name(file.name)} cannot be loaded by {FLAVOUR_NAMES[record.flavour]}: {reasons};"
                    f" {rebuild(record, place)}"
                )
            held.engines.append(engine)
            held.contexts.append(_create_context(engine, kernels, held))
        for part, engine in zip(self._manifest.parts, held.engines, strict=True):
            _check_signature(engine, (*part.inputs, *part.outputs), part.name, rebuild(record, place))
        self._plan_buffers()
        if self._cuda_graph and not all(_can_capture(context, held.stream) for context in held.contexts):
            raise EvlaError("cuda_graph=True: an engine of this artifact cannot be captured; load it without")

    def _plan_buffers(self) -> None:
        """Give every tensor of the chain one buffer on the GPU, and those of the policy itself one on the host."""
        held, manifest = self._held, self._manifest
        for part in manifest.parts:
            for spec in (*part.inputs, *part.outputs):
                if spec.name not in held.buffers:
                    held.buffers[spec.name] = held.cuda.allocate(_size(spec))
        for spec in (*manifest.inputs, *manifest.outputs):
            held.arrays[spec.name] = held.cuda.pinned(spec.shape, spec.dtype)
        for part, context in zip(manifest.parts, held.contexts, strict=True):
            for spec in (*part.inputs, *part.outputs):
                context.set_tensor_address(spec.name, held.buffers[spec.name])

    def run(self, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Run the engines once: the policy's inputs by name -> its outputs by name, in memory of their own.

        Raises:
            EvlaError: TensorRT or CUDA failed, or the session is closed.
        """
        held = self._held
        if not held.contexts:
            raise EvlaError("this policy is closed: load it again")
        for spec in self._manifest.inputs:
            held.arrays[spec.name][...] = feeds[spec.name]
        if held.graph is not None:
            held.cuda.launch(held.graph, held.stream)
        else:
            self._enqueue()
        held.cuda.synchronize(held.stream)
        if self._cuda_graph and held.graph is None:  # the first call has warmed everything up
            held.cuda.begin_capture(held.stream)
            self._enqueue()
            held.graph = held.cuda.end_capture(held.stream)
        return {spec.name: held.arrays[spec.name].copy() for spec in self._manifest.outputs}

    def _enqueue(self) -> None:
        """Put a whole call into the stream."""
        held = self._held
        read = {spec.name for part in self._manifest.parts for spec in part.inputs}
        for spec in self._manifest.inputs:
            if spec.name in read:
                held.cuda.copy_in(held.buffers[spec.name], held.arrays[spec.name], held.stream)
        for part, context in zip(self._manifest.parts, held.contexts, strict=True):
            if not context.execute_async_v3(int(held.stream)):
                raise EvlaError(f"TensorRT failed to run {part.name}")
        for spec in self._manifest.outputs:
            held.cuda.copy_out(held.arrays[spec.name], held.buffers[spec.name], held.stream)


class _Held:
    """What a session holds on the GPU, and the order in which it is given back."""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.runtime: Any = None
        self.stream: Any = None
        self.graph: Any = None
        self.engines: list[Any] = []
        self.contexts: list[Any] = []
        self.kernels: list[tuple[Any, Path]] = []
        self.buffers: dict[str, int] = {}
        self.arrays: dict[str, NDArray[Any]] = {}

    def release(self) -> None:
        """Give everything back: the graph before the contexts that it runs, these before their engines."""
        with ExitStack() as last:  # runs its callbacks in reverse, all of them even if one fails
            if self.stream is not None:
                last.callback(self.cuda.destroy_stream, self.stream)
            for array in self.arrays.values():
                last.callback(self.cuda.free_pinned, array)
            for address in self.buffers.values():
                last.callback(self.cuda.free, address)
            last.callback(setattr, self, "runtime", None)
            last.callback(self.engines.clear)
            last.callback(self.contexts.clear)
            for cache, file in self.kernels:
                last.callback(_keep_kernels, cache, file)
            if self.graph is not None:
                last.callback(self.cuda.destroy_graph, self.graph)
            self.stream, self.graph = None, None
        self.buffers, self.arrays, self.kernels = {}, {}, []


def _create_context(engine: Any, kernels: Path | None, held: _Held) -> Any:
    if kernels is None:
        context = engine.create_execution_context()
    else:
        settings = engine.create_runtime_config()
        cache = settings.create_runtime_cache()
        if kernels.exists():
            cache.deserialize(kernels.read_bytes())
        settings.set_runtime_cache(cache)
        context = engine.create_execution_context(settings)
        held.kernels.append((cache, kernels))
    if context is None:
        raise EvlaError("TensorRT cannot create an execution context: most often GPU memory is short")
    return context


def _keep_kernels(cache: Any, file: Path) -> None:
    new = file.with_name(f".{file.name}.partial")
    new.write_bytes(bytes(cache.serialize()))
    new.replace(file)


def _can_capture(context: Any, stream: Any) -> bool:
    """Tell whether a context can be captured, which TensorRT-RTX says and TensorRT does not need to."""
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


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
