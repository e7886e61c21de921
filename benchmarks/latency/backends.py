"""Backends of a row: eager torch, Inductor, CUDA graphs, ONNX Runtime; each checked against the row's eager graph."""

import shutil
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.latency.policies import PreparedRow
from benchmarks.latency.rows import DtypeName
from benchmarks.latency.timing import Stopwatch
from evla_compile import runtime
from evla_compile.compiled_policy import CompiledPolicy
from evla_compile.errors import EvlaError
from evla_compile.families.cogact.model.upstream import UpstreamCogACT
from evla_compile.graph.inputs import to_tensors
from evla_compile.host.inputs import GraphInputs
from evla_compile.host.processor import BLANK_ID, BOS_ID, EOS_ID
from evla_compile.runtime import Provider
from evla_compile.settings.config import PAPER_TEXT_TOKENS
from evla_compile.settings.sizes import ModelSizes

Backend: TypeAlias = Literal["eager", "compile", "cudagraphs", "compile-cudagraphs", "onnx-cpu", "onnx-cuda"]
"""`compile` is Inductor, `cudagraphs` records the eager kernels, `compile-cudagraphs` those of Inductor."""
BACKENDS: tuple[Backend, ...] = get_args(Backend)

Module: TypeAlias = Callable[..., Tensor]
"""A component of a graph as a function: eager, compiled or recorded."""

_WARM_UP_CALLS = 3


TimedCall: TypeAlias = Callable[[GraphInputs, Stopwatch], NDArray[np.float32]]
"""One call: inputs -> raw samples [1,A,F] in host memory; marks where components begin and end, if it can."""


def draw_inputs(sizes: ModelSizes, seed: int) -> GraphInputs:
    """Return random inputs for one call: the content of image and prompt does not affect the time."""
    draw = np.random.Generator(np.random.PCG64(seed))
    words = draw.integers(EOS_ID + 1, min(BLANK_ID, sizes.language.vocabulary), PAPER_TEXT_TOKENS - 2)
    side = sizes.image_side
    return GraphInputs(
        image=draw.integers(0, 256, (1, side, side, 3), dtype=np.uint8),
        input_ids=np.array([[BOS_ID, *words, EOS_ID]], dtype=np.int64),
        text_length=np.array([PAPER_TEXT_TOKENS], dtype=np.int64),
        noise=draw.standard_normal((1, sizes.action.chunk, sizes.action.action_width), dtype=np.float32),
    )


def check_backends(backends: Sequence[Backend], device: torch.device, dtype: DtypeName) -> None:
    """Refuse a backend that cannot be used on this machine, before any work for it.

    Raises:
        EvlaError: the message names the backend, what it lacks, and the remedy.
    """
    for backend in backends:
        if backend.endswith("cudagraphs") and device.type != "cuda":
            raise EvlaError(f"backend {backend}: needs a GPU, found device {device}; run it with --device cuda")
        if backend.startswith("compile"):
            _check_inductor(backend, device)
        if backend.startswith("onnx"):
            _check_onnx(backend, device, dtype)


def make_sampler(
    backend: Backend, prepared: PreparedRow, *, device: torch.device, compile_mode: str, threads: int, folder: Path
) -> TimedCall:
    """Return a row as a backend runs it.

    Args:
        backend: the backend; "eager" for the policy as upstream runs it.
        prepared: the row.
        device: where its weights are.
        compile_mode: Inductor's mode.
        threads: threads of ONNX Runtime on a CPU.
        folder: an empty folder for what the backend needs on disk; it is empty again afterwards.

    Raises:
        EvlaError: the row cannot be exported or loaded.
        ValueError: upstream's policy is asked for on another backend.
    """
    if isinstance(prepared.policy, UpstreamCogACT):
        if backend != "eager":
            raise ValueError(f"row {prepared.row.label} on {backend}: the policy as upstream runs it is eager")
        return _Upstream(prepared.policy, device)
    if backend.startswith("onnx"):
        return _onnx(prepared.policy, "cuda" if backend == "onnx-cuda" else "cpu", threads, folder)
    modules: Sequence[Module] = prepared.components
    if backend.startswith("compile"):
        modules = [
            torch.compile(graph, fullgraph=True, dynamic=False, mode=compile_mode) for graph in prepared.components
        ]
    if backend.endswith("cudagraphs"):
        return _CudaGraphs(modules, prepared.policy.sizes, device)
    return _Chain(modules, device)


class _Upstream:
    """The policy as upstream runs it, eagerly; hooks mark its components."""

    def __init__(self, policy: UpstreamCogACT, device: torch.device) -> None:
        """Hook into `policy`, whose weights are on `device`."""
        self._policy = policy
        self._device = device
        self._stopwatch: Stopwatch | None = None
        self._seeing = True
        policy.projector.register_forward_hook(lambda *_: self._mark())
        policy.action_model.register_forward_pre_hook(lambda *_: self._mark_first_step())

    def __call__(self, inputs: GraphInputs, stopwatch: Stopwatch) -> NDArray[np.float32]:
        self._stopwatch, self._seeing = stopwatch, True
        image, ids, _, noise = to_tensors(inputs, self._device)
        self._mark()
        with torch.no_grad():
            samples = self._policy(image, ids, noise)[0]
        self._mark()
        return _to_host(samples)

    def _mark(self) -> None:
        if self._stopwatch is not None:
            self._stopwatch.mark()

    def _mark_first_step(self) -> None:
        if self._seeing:
            self._seeing = False
            self._mark()


class _Chain:
    """Components of a graph, run one after the other."""

    def __init__(self, modules: Sequence[Module], device: torch.device) -> None:
        self._modules = modules
        self._device = device

    def __call__(self, inputs: GraphInputs, stopwatch: Stopwatch) -> NDArray[np.float32]:
        return _to_host(_run(self._modules, to_tensors(inputs, self._device), stopwatch.mark))


class _CudaGraphs:
    """Components of a graph, recorded once as CUDA graphs with their own buffers, and replayed."""

    def __init__(self, modules: Sequence[Module], sizes: ModelSizes, device: torch.device) -> None:
        self._inputs = to_tensors(draw_inputs(sizes, seed=0), device)
        self._graphs: list[torch.cuda.CUDAGraph] = []
        side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # as torch left it
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_CALLS):
                _run(modules, self._inputs, lambda: None)
        torch.cuda.current_stream(device).wait_stream(side)
        pool, handed = torch.cuda.graph_pool_handle(), tuple[Tensor, ...]()
        with torch.no_grad():
            for module in modules:
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._samples = module(*self._inputs, *handed)
                handed = (self._samples,)
                self._graphs.append(graph)

    def __call__(self, inputs: GraphInputs, stopwatch: Stopwatch) -> NDArray[np.float32]:
        for buffer, array in zip(self._inputs, inputs.arrays, strict=True):
            buffer.copy_(torch.from_numpy(array))
        stopwatch.mark()
        for graph in self._graphs:
            graph.replay()
            stopwatch.mark()
        return _to_host(self._samples)


def _onnx(policy: CompiledPolicy, provider: Provider, threads: int, folder: Path) -> TimedCall:
    artifact = folder / "row"
    policy.export(artifact)
    loaded = runtime.load(artifact, provider=provider, threads=threads, check_hashes=False)
    shutil.rmtree(artifact)  # a session keeps what it has read
    return lambda inputs, _: loaded.sample(*inputs.arrays)


def _run(modules: Sequence[Module], inputs: Sequence[Tensor], mark: Callable[[], object]) -> Tensor:
    handed: tuple[Tensor, ...] = ()
    mark()
    with torch.no_grad():
        for module in modules:
            handed = (module(*inputs, *handed),)
            mark()
    return handed[0]


def _to_host(samples: Tensor) -> NDArray[np.float32]:
    array: NDArray[np.float32] = samples.cpu().numpy()
    return array


def _check_inductor(backend: Backend, device: torch.device) -> None:
    if device.type == "cuda" and find_spec("triton") is None:
        raise EvlaError(
            f"backend {backend}: Inductor needs triton on a GPU, and it is not installed: pip install triton"
        )
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++"))):
        raise EvlaError(f"backend {backend}: Inductor needs a C++ compiler on a CPU, found none: apt install g++")


def _check_onnx(backend: Backend, device: torch.device, dtype: DtypeName) -> None:
    kind = backend.removeprefix("onnx-")
    if device.type != kind:
        raise EvlaError(f"backend {backend}: found device {device}; run it with --device {kind}")
    if dtype != "float32":
        raise EvlaError(f"backend {backend}: only float32 policies are exported; run it with --dtype float32")
    extra = {"cpu": "cpu", "cuda": "gpu"}[kind]
    if find_spec("onnxruntime") is None:
        raise EvlaError(f'backend {backend}: ONNX Runtime is not installed: pip install "evla-compile[{extra}]"')
    available = import_module("onnxruntime").get_available_providers()
    if f"{kind.upper()}ExecutionProvider" not in available:
        raise EvlaError(
            f"backend {backend}: ONNX Runtime offers {', '.join(available)} alone: remove every onnxruntime package,"
            f' then pip install "evla-compile[{extra}]"'
        )
