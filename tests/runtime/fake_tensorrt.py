"""A recorded FAKE of TensorRT and CUDA: it notes every call in order and computes a toy policy on the host.

It stands in for a GPU that is not there, and proves the host's logic alone: which buffers there are, what is copied
where and when, what is destroyed before what. That TensorRT computes what it should, only a GPU shows.
"""

import ctypes
import json
from collections.abc import Iterable, Sequence
from time import sleep
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

VERSION = "10.13.0"
ADDRESS = 0x1000


def fake_engine(
    name: str, tensors: Iterable[tuple[str, str, Sequence[int], bool]], *, host_code: bool = False
) -> bytes:
    """Return an engine file of the fake: name, and (tensor, dtype, shape, whether it is an input) of its tensors.

    Version-compatible engines have host code, which the runtime must be told to allow.
    """
    plain = [list(map(_plain, entry)) for entry in tensors]
    return json.dumps({"name": name, "tensors": plain, "host_code": host_code}).encode()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


class FakeGpu:
    """Device memory, streams and graphs of the fake, and the log of all calls."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.memory: dict[int, NDArray[np.uint8]] = {}
        self.host: dict[int, Any] = {}
        self.count = 1
        self.name = "Fake RTX"
        self.capability = "8.9"
        self.wait = 0.0
        self.refusing: str | None = None
        self.capturing: list[Any] | None = None
        self.failing: str | None = None
        self.capturable = True
        self.host_code_allowed: bool | None = None

    def say(self, *words: object, gives: tuple[Any, ...] = ()) -> tuple[Any, ...]:
        self.log.append(" ".join(map(str, words)))
        return gives

    def do(self, work: Any) -> None:
        """Run work that is put into a stream, or record it."""
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)

    def runtime(self) -> Any:
        """Return the module `cuda.bindings.runtime`."""
        ok, gpu = SimpleNamespace(cudaSuccess=0, cudaErrorNoDevice=100, cudaErrorInsufficientDriver=35), self
        major, minor = map(int, self.capability.split("."))
        properties = SimpleNamespace(
            name=self.name.encode() + b"\0",
            major=major,
            minor=minor,
            totalGlobalMem=24_000,
            multiProcessorCount=24,
        )

        def call(name: str, work: Any) -> Any:
            def function(*arguments: Any) -> tuple[Any, ...]:
                if gpu.failing == name:
                    return (2,)
                return 0, *work(*arguments)

            return function

        functions = {
            "cudaGetDeviceProperties": lambda index: (properties,),
            "cudaDriverGetVersion": lambda: (13010,),
            "cudaMalloc": self._allocate,
            "cudaFree": self._free,
            "cudaMallocHost": self._pin,
            "cudaFreeHost": self._unpin,
            "cudaMemcpyAsync": self._copy,
            "cudaStreamCreate": lambda: self.say("create stream", gives=(7,)),
            "cudaStreamSynchronize": self._synchronize,
            "cudaStreamDestroy": lambda stream: self.say("destroy stream"),
            "cudaStreamBeginCapture": self._begin,
            "cudaStreamEndCapture": self._end,
            "cudaGraphInstantiate": lambda graph, flags: (graph,),
            "cudaGraphDestroy": lambda graph: self.say("destroy recording"),
            "cudaGraphLaunch": self._launch,
            "cudaGraphExecDestroy": lambda graph: self.say("destroy graph"),
        }
        return SimpleNamespace(
            cudaError_t=ok,
            cudaMemcpyKind=SimpleNamespace(cudaMemcpyHostToDevice="in", cudaMemcpyDeviceToHost="out"),
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
            cudaGetErrorName=lambda status: (0, b"cudaErrorMemoryAllocation"),
            cudaGetDeviceCount=lambda: (0 if self.count else 100, self.count),
            **{name: call(name, work) for name, work in functions.items()},
        )

    def _allocate(self, size: int) -> tuple[int]:
        address = ADDRESS * (len(self.memory) + 1)
        self.memory[address] = np.zeros(size, dtype=np.uint8)
        self.say("allocate", size)
        return (address,)

    def _free(self, address: int) -> tuple[()]:
        del self.memory[address]
        self.say("free")
        return ()

    def _pin(self, size: int) -> tuple[int]:
        contents = (ctypes.c_uint8 * size)()
        self.host[ctypes.addressof(contents)] = contents
        return (ctypes.addressof(contents),)

    def _unpin(self, address: int) -> tuple[()]:
        self.say("free pinned")
        # The memory itself is left to Python: an array that outlives the session must not crash the tests.
        assert address in self.host
        return ()

    def _copy(self, to: int, source: int, size: int, kind: str, stream: int) -> tuple[()]:
        assert stream == 7
        self.say("copy", kind, size)

        def work() -> None:
            if kind == "in":
                ctypes.memmove(self.memory[to].ctypes.data, source, size)
            else:
                ctypes.memmove(to, self.memory[source].ctypes.data, size)

        self.do(work)
        return ()

    def _synchronize(self, stream: int) -> tuple[()]:
        self.say("synchronize")
        sleep(self.wait)
        return ()

    def _begin(self, stream: int, mode: int) -> tuple[()]:
        self.say("begin capture")
        self.capturing = []
        return ()

    def _end(self, stream: int) -> tuple[list[Any]]:
        self.say("end capture")
        recorded, self.capturing = self.capturing or [], None
        return (recorded,)

    def _launch(self, graph: list[Any], stream: int) -> tuple[()]:
        self.say("launch")
        for work in graph:
            work()
        return ()


class FakeTensorRT:
    """The module `tensorrt` or `tensorrt_rtx`; its engines add 1 to what they read and sum it up."""

    def __init__(self, gpu: FakeGpu, version: str = VERSION) -> None:
        self.__version__ = version
        self._gpu = gpu

    class ILogger:
        """Base of loggers."""

        ERROR, WARNING = 1, 2

    def Runtime(self, logger: Any) -> Any:  # noqa: N802 (the library's name)
        return _Runtime(self._gpu, logger)


class _Runtime:
    def __init__(self, gpu: FakeGpu, logger: Any) -> None:
        self._gpu, self._logger = gpu, logger
        self.engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        try:
            engine = json.loads(data)
        except ValueError:
            self._logger.log(1, "Magic tag does not match")
            return None
        if engine.get("host_code") and not self.engine_host_code_allowed:
            self._logger.log(1, "The engine contains host code, which is not allowed")
            return None
        self._gpu.host_code_allowed = self.engine_host_code_allowed
        return _Engine(self._gpu, engine)


class _Engine:
    def __init__(self, gpu: FakeGpu, data: Any) -> None:
        self._gpu, self.name, self._tensors = gpu, data["name"], data["tensors"]
        self._gpu.say("load", self.name)
        self.num_io_tensors = len(self._tensors)

    def __del__(self) -> None:
        self._gpu.say("destroy engine", self.name)

    def get_tensor_name(self, index: int) -> str:
        name: str = self._tensors[index][0]
        return name

    def _named(self, name: str) -> Any:
        return next(entry for entry in self._tensors if entry[0] == name)

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self._named(name)[1])

    def get_tensor_shape(self, name: str) -> Any:
        return self._named(name)[2]

    def create_runtime_config(self) -> Any:
        gpu = self._gpu

        class Cache:
            data = b""

            def deserialize(self, data: bytes) -> bool:
                gpu.say("read kernels", len(data))
                if gpu.refusing == "kernels":
                    return False
                self.data = data
                return True

            def serialize(self) -> bytes:
                gpu.say("keep kernels")
                return self.data + b"kernel"

        return SimpleNamespace(
            create_runtime_cache=lambda: None if gpu.refusing == "create_runtime_cache" else Cache(),
            set_runtime_cache=lambda cache: gpu.refusing != "set_runtime_cache",
        )

    def create_execution_context(self, config: Any = None) -> Any:
        return _Context(self._gpu, self.name, self._tensors)


class _Context:
    def __init__(self, gpu: FakeGpu, name: str, tensors: Any) -> None:
        self._gpu, self._name, self._tensors = gpu, name, tensors
        self._addresses: dict[str, int] = {}

    def __del__(self) -> None:
        self._gpu.say("destroy context", self._name)

    def is_stream_capturable(self, stream: int) -> bool:
        return self._gpu.capturable

    def set_tensor_address(self, name: str, address: int) -> bool:
        if self._gpu.refusing == name:
            return False
        self._addresses[name] = address
        self._gpu.say("bind", self._name, name)
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == 7
        self._gpu.say("execute", self._name)
        doing = "execute" if self._gpu.capturing is None else "capture"
        if self._gpu.failing in ("execute", f"{doing} {self._name}"):
            return False
        self._gpu.do(self._work)
        return True

    def _work(self) -> None:
        total = 1.0
        for name, dtype, shape, is_input in self._tensors:
            if is_input:
                total += float(self._array(name, dtype, shape).astype(np.float64).sum())
        for name, dtype, shape, is_input in self._tensors:
            if not is_input:
                self._array(name, dtype, shape)[...] = total

    def _array(self, name: str, dtype: str, shape: Any) -> NDArray[Any]:
        names = {"UINT8": np.uint8, "INT64": np.int64, "FLOAT": np.float32}
        return self._gpu.memory[self._addresses[name]].view(names[dtype]).reshape(shape)
