"""GPU and host resources of an engine session, and the order in which they are released; no torch."""

from collections.abc import Iterable
from contextlib import ExitStack, suppress
from threading import RLock
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evla_compile.artifact.records import Part, TensorSpec
from evla_compile.errors import EvlaError
from evla_compile.runtime.kernel_cache import KernelCache
from evla_compile.tensorrt.cuda import Cuda


class EngineResources:
    """Engines, contexts, buffers, a stream and a graph.

    Attributes:
        lock: held during every use: one call at a time, since all calls share the buffers and the stream. It is
            re-entrant, since the garbage collector may release resources at any point of a call.
        buffers: address on the GPU of every tensor of the chain, by name.
        arrays: pinned host memory of the policy's inputs and outputs, by name.
    """

    def __init__(self, cuda: Cuda) -> None:
        self.cuda = cuda
        self.lock = RLock()
        self.runtime: Any = None
        self.stream: Any = None
        self.graph: Any = None
        self.engines: list[Any] = []
        self.contexts: list[Any] = []
        self.kernels: list[KernelCache] = []
        self.buffers: dict[str, int] = {}
        self.arrays: dict[str, NDArray[Any]] = {}

    def allocate(self, parts: Iterable[Part], policy: Iterable[TensorSpec]) -> None:
        """Allocate a GPU buffer for every tensor of the chain, and pinned memory for the policy's inputs and outputs.

        Raises:
            EvlaError: memory is short.
        """
        for part in parts:
            for spec in (*part.inputs, *part.outputs):
                if spec.name not in self.buffers:
                    self.buffers[spec.name] = self.cuda.allocate(_size(spec))
        for spec in policy:
            self.arrays[spec.name] = self.cuda.pinned(spec.shape, spec.dtype)

    def drain(self) -> None:
        """Wait for the work that a failed call left in the stream; further errors are ignored."""
        with suppress(EvlaError):
            self.cuda.synchronize(self.stream)

    def release(self) -> None:
        """Release everything, once the stream is idle: the graph before the contexts, these before their engines.

        Raises:
            EvlaError: CUDA failed, or kernels could not be saved; everything else has been released.
        """
        with self.lock, ExitStack() as last:  # runs its callbacks in reverse, and all even if one fails
            if self.stream is not None:
                last.callback(self.cuda.destroy_stream, self.stream)
            for array in self.arrays.values():
                last.callback(self.cuda.free_pinned, array)
            for address in self.buffers.values():
                last.callback(self.cuda.free, address)
            last.callback(setattr, self, "runtime", None)
            last.callback(self.engines.clear)
            last.callback(self.contexts.clear)
            for cache in self.kernels:
                last.callback(cache.keep)
            if self.graph is not None:
                last.callback(self.cuda.destroy_graph, self.graph)
            if self.stream is not None:
                last.callback(self.cuda.synchronize, self.stream)
            self.stream, self.graph = None, None
            self.buffers, self.arrays, self.kernels = {}, {}, []


def _size(spec: TensorSpec) -> int:
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize
