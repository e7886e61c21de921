"""The CUDA calls of the runtime, through cuda-bindings, each with its status checked; no torch."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from evla_compile.errors import EvlaError

REMEDY = 'pip install "evla-compile[tensorrt]" or "evla-compile[rtx]", which bring cuda-bindings'
"""How to install cuda-bindings."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """The first GPU of this machine."""

    name: str
    """Product name, as the driver reports it."""
    compute_capability: str
    """Such as `8.9`."""
    memory_bytes: int
    """Its memory; on a Jetson the CPU shares it."""
    processors: int
    """Its streaming multiprocessors; a Jetson's power mode turns some of them off."""
    driver_version: str
    """Newest CUDA that the driver supports, such as `13.0`."""


def find_gpu() -> Gpu | None:
    """Return the first GPU; None where there is no driver or no GPU.

    Raises:
        EvlaError: cuda-bindings is not installed, so that it is unknown, or the driver fails.
    """
    runtime = _runtime()
    status, count = runtime.cudaGetDeviceCount()
    none = (runtime.cudaError_t.cudaErrorNoDevice, runtime.cudaError_t.cudaErrorInsufficientDriver)
    if status in none or (status == runtime.cudaError_t.cudaSuccess and count == 0):
        return None
    cuda = Cuda()
    properties = cuda.checked("cudaGetDeviceProperties", 0)
    version = cuda.checked("cudaDriverGetVersion")
    name = properties.name.decode() if isinstance(properties.name, bytes) else str(properties.name)
    return Gpu(
        name=name.rstrip("\0"),
        compute_capability=f"{properties.major}.{properties.minor}",
        memory_bytes=int(properties.totalGlobalMem),
        processors=int(properties.multiProcessorCount),
        driver_version=f"{version // 1000}.{version % 1000 // 10}",
    )


@dataclass(slots=True)
class Recording:
    """Work captured from a stream; complete when `Cuda.capturing` ends."""

    graph: Any = None
    """CUDA's graph of the work, which must be instantiated before it can be launched."""


class Cuda:
    """CUDA's runtime: memory, copies, a stream, graphs."""

    def __init__(self) -> None:
        """Load cuda-bindings.

        Raises:
            EvlaError: it is not installed.
        """
        self._runtime = _runtime()

    def checked(self, name: str, *arguments: Any) -> Any:
        """Call a function of CUDA's runtime and return its results: none, one, or a tuple.

        Raises:
            EvlaError: it failed; the message names the function and CUDA's error.
        """
        status, *results = getattr(self._runtime, name)(*arguments)
        if status != self._runtime.cudaError_t.cudaSuccess:
            _, error = self._runtime.cudaGetErrorName(status)
            raise EvlaError(f"{name} failed: {error.decode() if isinstance(error, bytes) else error}")
        return results[0] if len(results) == 1 else tuple(results) or None

    def allocate(self, size: int) -> int:
        """Return the address of `size` bytes of GPU memory."""
        return int(self.checked("cudaMalloc", size))

    def free(self, address: int) -> None:
        """Free GPU memory."""
        self.checked("cudaFree", address)

    def pinned(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """Return an array in page-locked host memory, which asynchronous copies need; see `free_pinned`."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        address = int(self.checked("cudaMallocHost", size))
        contents = (ctypes.c_uint8 * size).from_address(address)
        array: NDArray[Any] = np.ctypeslib.as_array(contents).view(dtype).reshape(shape)
        return array

    def free_pinned(self, array: NDArray[Any]) -> None:
        """Free the memory of a `pinned` array, which must not be used any more."""
        self.checked("cudaFreeHost", array.ctypes.data)

    def copy_in(self, address: int, array: NDArray[Any], stream: Any) -> None:
        """Start copying an array to the GPU."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.checked("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, kind, stream)

    def copy_out(self, array: NDArray[Any], address: int, stream: Any) -> None:
        """Start copying from the GPU to an array."""
        kind = self._runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.checked("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, kind, stream)

    def create_stream(self) -> Any:
        """Return a new stream."""
        return self.checked("cudaStreamCreate")

    def synchronize(self, stream: Any) -> None:
        """Wait until everything in a stream is done."""
        self.checked("cudaStreamSynchronize", stream)

    def destroy_stream(self, stream: Any) -> None:
        """Destroy a stream."""
        self.checked("cudaStreamDestroy", stream)

    @contextmanager
    def capturing(self, stream: Any) -> Iterator["Recording"]:
        """Capture the work enqueued in a stream within the block, instead of running it.

        Raises:
            EvlaError: CUDA cannot begin or end the capture.
        """
        mode = self._runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.checked("cudaStreamBeginCapture", stream, mode)
        recording = Recording()
        try:
            yield recording
        except BaseException:
            # Otherwise the stream would stay in capture mode. The failure may have ended the capture already.
            with suppress(EvlaError):
                self.checked("cudaGraphDestroy", self.checked("cudaStreamEndCapture", stream))
            raise
        recording.graph = self.checked("cudaStreamEndCapture", stream)

    def instantiate(self, recording: "Recording") -> Any:
        """Return recorded work as a graph that can be launched."""
        try:
            return self.checked("cudaGraphInstantiate", recording.graph, 0)
        finally:
            self.checked("cudaGraphDestroy", recording.graph)

    def launch(self, graph: Any, stream: Any) -> None:
        """Run recorded work once."""
        self.checked("cudaGraphLaunch", graph, stream)

    def destroy_graph(self, graph: Any) -> None:
        """Destroy an instantiated graph."""
        self.checked("cudaGraphExecDestroy", graph)


def _runtime() -> Any:
    try:
        return import_module("cuda.bindings.runtime")
    except ImportError as error:
        raise EvlaError(f"CUDA cannot be called from Python ({error}): {REMEDY}") from error
