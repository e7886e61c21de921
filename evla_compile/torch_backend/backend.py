"""`torch.compile(policy, backend="evla")`: the pipeline's passes on the graph that Dynamo captured.

Dynamo passes the backend a graph of torch calls with the parameters as inputs. The call of a policy in it is traced to
ATen operators, and its parameters become constants under their names in the checkpoint: then it is a graph like that of
`capture`, but with its sampler unrolled already. Anything else that the compiled function computes runs eagerly.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx
from torch.utils import _device

from evla_compile.calibration.fingerprint import check_checkpoint
from evla_compile.compiler.pipeline import build_passes
from evla_compile.errors import UnsupportedModelError
from evla_compile.graph.contract import GraphPass, copy_graph, fake_mode, materialize, propagate, replace_tensor
from evla_compile.graph.finite_weights import check_finite
from evla_compile.graph.policy_call import find_policy_call, replace_policy_call
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import indexed_modules, input_node, is_call, module_path
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.passes import UnrollDiffusion
from evla_compile.settings.anatomy import COGACT, INPUT_IDS
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, check_plan, plan_without_calibration
from evla_compile.torch_backend.dynamo_graph import DynamoGraph, find_sizes, read_graph

Mode: TypeAlias = Literal["inductor", "eager"]
"""What runs the rewritten graph."""

Compiled: TypeAlias = Callable[..., Sequence[Tensor]]
"""The function that Dynamo calls instead of its graph, with all inputs of the graph."""

aten = torch.ops.aten


def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile the whole sampler of a `CogACT`, as Dynamo captured it; the backend `evla` of `torch.compile`.

    The graph has one call of the policy. Its inputs may be computed within the graph, and its samples used there: that
    runs operator by operator, as without a compiler. The policy itself runs under its own torch settings, see
    `own_torch_state`, not under those of the caller.

    Dynamo keeps one graph for all policies with the same modules and shapes, while the rewrites slice and fold weights.
    So every set of weights is compiled separately, at its first call, and again after it was changed in place. A change
    through `parameter.data` cannot be noticed; call `torch._dynamo.reset()` after it.

    Args:
        gm: the Dynamo graph of a call of `CogACT`, batch and text budget those of the first call.
        inputs: the inputs that it was captured with.
        options: `config`, a `CompileConfig`, by default `CompileConfig()`; `plan`, that of an earlier `calibrate`, for
            budgets that need one; `mode`, "inductor" (default) or "eager".

    Raises:
        CalibrationError: a budget needs a plan and none is given, or it does not fit.
        CheckpointError: a weight has values that are not finite.
        PassError: a rewrite does not find its site, or the text length was captured as a constant.
        UnsupportedModelError: the graph has no whole call of a `CogACT`, or several, or one that cannot be compiled.
        ValueError: an option is unknown, or the first call was not of the configuration's sizes.
    """
    config, plan, mode = _read_options(options or {})
    if config.solver != "ddim":
        raise ValueError(
            f"solver={config.solver!r}: torch.compile captures the policy's own loop, which is DDIM, so its steps"
            " cannot be replaced; give the backend solver='ddim', or compile the policy with evla_compile.compile"
        )
    _check_modes(gm.graph)
    with own_torch_state():
        found = read_graph(gm, inputs)
        sizes = find_sizes(found.graph)
        config = config.resolve(sizes)
        if plan is None:
            plan = plan_without_calibration(sizes, config)
        check_plan(plan, config, sizes)
        _check_call(found.graph, config)
        passes = tuple(  # the loop was unrolled when it was captured
            rewrite for rewrite in build_passes(config, plan, sizes) if not isinstance(rewrite, UnrollDiffusion)
        )
        compiled = _Compiled(found, plan, passes, mode, config.text_tokens)
        compiled.prepare([inputs[position] for position in found.weights.values()])
    positions = (*found.weights.values(), *(number.position for number in found.numbers))
    return _restoring_gradients(replace_policy_call(gm, compiled, positions))


def _restoring_gradients(run: Compiled) -> Compiled:
    """Return `run` such that an error leaves torch's gradients as they were.

    The graph itself switches them off around the policy and on again behind it, which an error would skip.
    """

    def call(*arguments: Any) -> Any:
        enabled = torch.is_grad_enabled()
        try:
            return run(*arguments)
        except BaseException:
            torch.set_grad_enabled(enabled)
            raise

    return call


class _Compiled:
    """A captured policy, compiled for every set of weights that it is called with."""

    def __init__(
        self, captured: DynamoGraph, plan: Plan, passes: Sequence[GraphPass], mode: Mode, text_tokens: int
    ) -> None:
        """Keep the graph, not rewritten yet."""
        self._captured, self._plan, self._passes = captured, plan, passes
        self._mode, self._text_tokens = mode, text_tokens
        self._runs: dict[tuple[int, ...], _WeightedRun] = {}

    def __call__(self, *arguments: Any) -> Tensor:
        """Run the policy on four inputs, followed by its weights and the numbers that it was captured with.

        Raises:
            ValueError: an input is not of the shape that was compiled, or a number is another.
        """
        inputs, rest = arguments[: len(COGACT.input_names)], arguments[len(COGACT.input_names) :]
        tensors, numbers = rest[: len(self._captured.weights)], rest[len(self._captured.weights) :]
        self._check_shapes(inputs)
        for number, given in zip(self._captured.numbers, numbers, strict=True):
            if given != number.value:
                raise ValueError(
                    f"{number.name}={float(given)}: the policy was compiled with {number.value} as a constant; call"
                    " torch._dynamo.reset(), then the policy as the configuration says"
                )
        with own_torch_state():
            result = self.prepare(tensors)(*inputs)
        samples: Tensor = result if isinstance(result, Tensor) else result[0]
        return samples

    def _check_shapes(self, inputs: Sequence[Tensor]) -> None:
        for name, tensor in zip(COGACT.input_names, inputs, strict=True):
            expected = list(input_node(self._captured.graph.graph, name).meta["val"].shape)
            if name == INPUT_IDS:
                expected[1] = self._text_tokens
            if list(tensor.shape) == expected:
                continue
            if name == INPUT_IDS and len(tensor) == expected[0]:
                raise ValueError(
                    f"input_ids has {tensor.shape[1]} text tokens, and this policy was compiled for"
                    f" text_tokens={self._text_tokens}: pad the prompt to that"
                )
            raise ValueError(
                f"{name} reaches the policy with the shape {list(tensor.shape)}, and it was compiled for {expected}"
            )

    def prepare(self, tensors: Sequence[Tensor]) -> Callable[..., Any]:
        """Return the policy compiled with the present values of these weights; compile it if needed."""
        key, state = tuple(map(id, tensors)), tuple(map(_state, tensors))
        run = self._runs.get(key)
        if run is None or not run.alive or run.state != state:
            named = dict(zip(self._captured.weights, tensors, strict=True))
            check_checkpoint(self._plan, named)
            check_finite(named.items())
            graph = copy_graph(self._captured.graph)
            for name, tensor in named.items():
                replace_tensor(graph, name, tensor.detach())
            propagate(graph)
            graph, _ = run_passes(graph, self._passes)
            materialize(graph)
            call = _inductor(graph) if self._mode == "inductor" else graph
            self._runs = {known: run for known, run in self._runs.items() if run.alive}
            self._runs[key] = _WeightedRun(tuple(map(weakref.ref, tensors)), state, call)
        return self._runs[key].call


@dataclass(frozen=True, slots=True)
class _WeightedRun:
    """A policy compiled with one set of weights."""

    tensors: tuple["weakref.ref[Tensor]", ...]
    """The weights; once one is deleted, another tensor may get its `id`."""
    state: tuple[tuple[int, int | None], ...]
    """Address and version of each weight, to notice changes."""
    call: Callable[..., Any]
    """Image, input ids, text length and noise -> samples."""

    @property
    def alive(self) -> bool:
        """Whether the weights still exist."""
        return all(tensor() is not None for tensor in self.tensors)


def _state(tensor: Tensor) -> tuple[int, int | None]:
    """Return the address of a weight's values and the number of writes; inference tensors have no such number."""
    return tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _read_options(options: Mapping[str, Any]) -> tuple[CompileConfig, Plan | None, Mode]:
    unknown = sorted(set(options) - {"config", "plan", "mode"})
    if unknown:
        raise ValueError(f"options {unknown}: expected config, plan and mode")
    config, plan, mode = options.get("config") or CompileConfig(), options.get("plan"), options.get("mode", "inductor")
    if not isinstance(config, CompileConfig) or not isinstance(plan, Plan | None):
        raise ValueError(f"options config={config!r:.60}, plan={plan!r:.60}: expected a CompileConfig and a Plan")
    if mode not in get_args(Mode):
        raise ValueError(f"options mode={mode!r}: expected one of {', '.join(get_args(Mode))}")
    return config, plan, mode


def _check_modes(graph: fx.Graph) -> None:
    """Refuse a policy that was captured while modes intercepted torch functions: their effect is in the graph.

    Raises:
        UnsupportedModelError: there was one other than a default device, which a policy does not read.
    """
    modes = find_policy_call(graph).enter.args[4]
    if isinstance(modes, int) and modes > (_device.CURRENT_DEVICE is not None):
        raise UnsupportedModelError(
            f"backend evla was called inside {modes} modes that intercept torch functions (TorchFunctionMode), which"
            " would change what is compiled: make the first call outside of them"
        )


def _check_call(gm: fx.GraphModule, config: CompileConfig) -> None:
    """Refuse a first call that was not of the configuration's sizes."""
    graph = gm.graph
    batch = int(input_node(graph, INPUT_IDS).meta["val"].shape[0])
    steps = len(indexed_modules(graph, COGACT.denoising))
    scales = [
        node.args[1]
        for node in graph.nodes
        if is_call(node, aten.mul.Tensor) and module_path(node) == f"{COGACT.denoising}.0.{COGACT.action_model}.net"
    ]
    found = {"batch_size": batch, "ddim_steps": steps, "cfg_scale": float(scales[0]) if scales else 1.0}
    wrong = [
        f"{name}={value}, not {getattr(config, name)}"
        for name, value in found.items()
        if value != getattr(config, name)
    ]
    if wrong:
        raise ValueError(
            f"the policy was called with {'; '.join(wrong)}: call it as the configuration says, or give the backend one"
            " that says what is called, options={'config': CompileConfig(...)}"
        )


def _inductor(gm: fx.GraphModule) -> Callable[..., Any]:
    """Compile a finished graph by Inductor."""
    with fake_mode(gm):
        inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    with torch.no_grad():
        compiled: Callable[..., Any] = torch._inductor.compile(gm, inputs)
    return compiled
