"""The result of a compilation: a policy whose graph is rewritten and static, ready to run or to export."""

from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal, NoReturn, Self, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from evla_compile.compiler.report import CompileReport
from evla_compile.errors import EvlaError
from evla_compile.graph.contract import materialize, weights
from evla_compile.graph.inputs import to_tensors
from evla_compile.graph.torch_state import own_torch_state, traceable_torch_state
from evla_compile.host.camera_frame import CameraFrame, Framing
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import GraphInputs, InputSignature, is_batch
from evla_compile.host.predictor import Predictor
from evla_compile.host.processor import Processor
from evla_compile.passes import ExposeStages
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan
from evla_compile.settings.sizes import ModelSizes

TensorCall: TypeAlias = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""A policy's graph on tensors: image, input ids, text length and noise -> raw samples."""

_NO_PICKLE = (
    "a CompiledPolicy cannot be pickled: export it, policy.export(DIR), and load it where it is needed,"
    " evla_compile.runtime.load(DIR); or compile it there, with plan=policy.plan to measure nothing again"
)


class CompiledGraph(Predictor):
    """A compiled policy, run by torch; `CompiledPolicy` adds its export.

    It can be copied, but not pickled: another process loads an export of it, or compiles for itself.

    Attributes:
        graph: the finished graph, image, input_ids, text_length and noise -> samples.
        config: settings of the compilation.
        plan: which layers and neurons stay.
        sizes: sizes of the dense policy.
        processor: host-side tokenizer, image preparation and action statistics.
        report: what every pass did.
        frames: observations that exports record to verify runtimes with; empty for images of seeded noise.
    """

    def __init__(
        self,
        *,
        graph: fx.GraphModule,
        config: CompileConfig,
        plan: Plan,
        sizes: ModelSizes,
        processor: Processor,
        report: CompileReport,
        frames: tuple[Frame, ...] = (),
    ) -> None:
        self.graph = graph
        self.config = config
        self.plan = plan
        self.sizes = sizes
        self.processor = processor
        self.report = report
        self.frames = frames
        self._deferred = True
        self._exposed: dict[tuple[str, ...], fx.GraphModule] = {("samples",): graph}

    def __reduce__(self) -> NoReturn:
        raise EvlaError(_NO_PICKLE)

    def __copy__(self) -> Self:
        """Return another policy that runs the same graph."""
        copied = object.__new__(type(self))
        copied.__dict__.update(self.__dict__)
        return copied

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Return another policy with its own graph and weights."""
        copied = object.__new__(type(self))
        memo[id(self)] = copied
        copied.__dict__.update({name: deepcopy(value, memo) for name, value in self.__dict__.items()})
        return copied

    @property
    def signature(self) -> InputSignature:
        """Sizes of what the graph takes."""
        return InputSignature.of(self.sizes, batch_size=self.config.batch_size, text_tokens=self.config.text_tokens)

    @own_torch_state()
    def sample(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return raw samples float32 [B,A,F]; see `outputs`.

        The first call computes the deferred weights (cut MLPs, casts) once for all, which takes their bytes of memory.
        """
        if self._deferred:
            materialize(self.graph)
            self._deferred = False
        return self.outputs(image, input_ids, text_length, noise)["samples"]

    @own_torch_state()
    def outputs(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
        *,
        stages: Sequence[str] = ("samples",),
    ) -> dict[str, NDArray[Any]]:
        """Return named values of the graph; what none of them needs is not computed.

        Deferred weights stay deferred: each is computed when it is read, then freed.

        Args:
            image: uint8 [B,S,S,3].
            input_ids: int64 [B,T], right-padded.
            text_length: int64 [B], real tokens of each row, from 2 to T.
            noise: float32 [B,A,F].
            stages: names; see `evla_compile.passes.ExposeStages`.

        Raises:
            PassError: the graph has no such stage.
            ValueError: an argument has another dtype or shape, or a token id or text length is out of range.
        """
        names = stage_names(stages)
        graph = self.exposing(names)
        inputs = GraphInputs(image=image, input_ids=input_ids, text_length=text_length, noise=noise)
        inputs.check(self.signature)
        device = next(iter(self.graph.graph.find_nodes(op="placeholder"))).meta["val"].device
        with torch.no_grad():
            results = graph(*to_tensors(inputs, device))
        values = (results,) if isinstance(results, torch.Tensor) else results
        return {name: _to_numpy(value) for name, value in zip(names, values, strict=True)}

    @own_torch_state()
    def to_torch(self, mode: Literal["eager", "inductor", "cudagraphs"] = "inductor") -> TensorCall:
        """Return the graph as a function of torch tensors, for programs that run torch.

        It takes `image`, `input_ids`, `text_length` and `noise` as tensors on the policy's device, in the shapes and
        dtypes of `outputs`, and returns raw samples float32 [B,A,F]. Deferred weights are computed here and stay.

        Args:
            mode: "eager" runs operator by operator; "inductor" compiles at the first call; "cudagraphs" does so too,
                and launches the compiled kernels as one CUDA graph, on a GPU.

        Raises:
            EvlaError: "cudagraphs" without a GPU.
            ValueError: another mode.
        """
        if mode not in ("eager", "inductor", "cudagraphs"):
            raise ValueError(f"mode={mode!r}: expected 'eager', 'inductor' or 'cudagraphs'")
        device = next(tensor.device for _, tensor in weights(self.graph))
        if mode == "cudagraphs" and device.type != "cuda":
            raise EvlaError(
                f"mode='cudagraphs' needs a GPU, and this policy is on {device}: load it with device='cuda'"
            )
        materialize(self.graph)
        self._deferred = False
        if mode == "eager":
            return _TensorCall(self.graph)
        kind = "reduce-overhead" if mode == "cudagraphs" else "default"
        return _TensorCall(
            torch.compile(self.graph, fullgraph=True, dynamic=False, mode=kind), copied=mode == "cudagraphs"
        )

    @own_torch_state()
    def exposing(self, stages: tuple[str, ...]) -> fx.GraphModule:
        """Return the graph with `stages` as its outputs; repeated calls return the same graph.

        Raises:
            PassError: the graph has no such stage.
        """
        if stages not in self._exposed:
            self._exposed[stages], _ = ExposeStages(stages=stages)(self.graph)
        return self._exposed[stages]

    def kept_tokens(
        self,
        image: CameraFrame | Sequence[CameraFrame],
        instruction: str | Sequence[str],
        *,
        framing: Framing = "whole",
    ) -> NDArray[np.int64]:
        """Return the patches that the policy keeps for an observation, ascending indices row by row of the image.

        The arguments are those of `predict_action`.

        Returns:
            int64 [K] for a single frame, [B,K] for a batch; all patches where the policy selects none.

        Raises:
            ValueError: an argument is refused.
        """
        inputs = GraphInputs.prepare(self.processor, image, instruction, self.signature, framing=framing)
        visual_tokens, _ = self.config.kept_tokens(self.sizes.patches)
        if visual_tokens == self.sizes.patches:
            kept = np.tile(np.arange(self.sizes.patches), (self.config.batch_size, 1))
        else:
            kept = self.outputs(*inputs.arrays, stages=("kept_patches",))["kept_patches"]
        return kept if is_batch(image) else kept[0]


class _TensorCall:
    """A graph that is run without gradients."""

    def __init__(self, run: Callable[..., Tensor], *, copied: bool = False) -> None:
        self._run, self._copied = run, copied

    def __reduce__(self) -> NoReturn:
        raise EvlaError(_NO_PICKLE)

    def __call__(self, image: Tensor, input_ids: Tensor, text_length: Tensor, noise: Tensor) -> Tensor:
        with traceable_torch_state(image.device), torch.no_grad():
            samples = self._run(image, input_ids, text_length, noise)
            # A CUDA graph writes every result to the same memory, so the next call would overwrite this one.
            return samples.clone() if self._copied else samples


def stage_names(stages: str | Sequence[str]) -> tuple[str, ...]:
    """Return names of stages as a tuple; a single string is one name."""
    return (stages,) if isinstance(stages, str) else tuple(stages)


def _to_numpy(value: torch.Tensor) -> NDArray[Any]:
    """Return a tensor as an array; bfloat16, which numpy lacks, as float32."""
    array: NDArray[Any] = (value.float() if value.dtype == torch.bfloat16 else value).cpu().numpy()
    return array
