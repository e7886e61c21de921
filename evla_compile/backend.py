"""`torch.compile(policy, backend="evla")`: the pipeline's passes on the graph that Dynamo captured.

Dynamo hands over a graph of torch calls with the parameters as inputs. It is traced to ATen operators, its parameters
become constants under their names in the checkpoint, and from there on it is a graph like that of `capture`, its
sampler unrolled already.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

from evla_compile.budgets import resolve
from evla_compile.config import CompileConfig
from evla_compile.dynamo_graph import find_sizes, read_graph
from evla_compile.errors import PassError
from evla_compile.fingerprint import check_checkpoint
from evla_compile.finite_weights import check_finite
from evla_compile.graph import (
    GraphPass,
    copy_graph,
    fake_mode,
    materialize,
    propagate,
    replace_tensor,
)
from evla_compile.passes import UnrollDiffusion
from evla_compile.pipeline import build_passes, check_plan
from evla_compile.plan import Plan, plan_without_calibration
from evla_compile.sites import (
    ACTION_MODEL,
    DENOISING,
    INPUT_NAMES,
    indexed_modules,
    input_node,
    is_call,
    module_path,
)

Mode: TypeAlias = Literal["inductor", "eager"]
"""What runs the rewritten graph."""

Compiled: TypeAlias = Callable[..., Sequence[Tensor]]
"""What Dynamo calls instead of its own graph, with all its inputs."""

aten = torch.ops.aten


def compile_fx(gm: fx.GraphModule, inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None) -> Compiled:
    """Compile the whole sampler of a `CogACT`, as Dynamo captured it; the backend `evla` of `torch.compile`.

    Dynamo keeps one graph for all policies of the same form, while the rewrites cut and fold weights: every set of
    weights is compiled by itself, at its first call, and anew when it was changed in place. A change through
    `parameter.data` alone leaves no trace and does not arrive; `torch._dynamo.reset()` makes it.

    Args:
        gm: Dynamo's graph of `CogACT.forward`, batch and text budget those of the first call.
        inputs: what it was captured with.
        options: `config`, a `CompileConfig`, by default `CompileConfig()`; `plan`, that of an earlier `calibrate`, for
            budgets that need one; `mode`, "inductor" (default) or "eager".

    Raises:
        CalibrationError: a budget needs a plan and none is given, or it does not fit.
        CheckpointError: a weight has values that are not finite.
        PassError: a rewrite does not find its site.
        UnsupportedModelError: the graph is not that of a `CogACT`, or not all of it.
        ValueError: an option is unknown, or the first call was not of the configuration's sizes.
    """
    config, plan, mode = _read_options(options or {})
    graph, order, held = read_graph(gm, inputs)
    sizes = find_sizes(graph)
    config = resolve(config, sizes)
    if plan is None:
        plan = plan_without_calibration(sizes.language, config)
    check_plan(plan, config, sizes)
    _check_call(graph, config)
    passes = tuple(  # the loop was unrolled as it was captured
        rewrite for rewrite in build_passes(config, plan, sizes) if not isinstance(rewrite, UnrollDiffusion)
    )
    compiled = _Compiled(graph, order, held, plan, passes, mode, config.text_tokens)
    compiled.prepare(inputs)
    return compiled


class _Compiled:
    """A captured policy, compiled for every set of weights that Dynamo calls it with."""

    def __init__(
        self,
        captured: fx.GraphModule,
        order: Sequence[int],
        held: Mapping[str, int],
        plan: Plan,
        passes: Sequence[GraphPass],
        mode: Mode,
        text_tokens: int,
    ) -> None:
        """Take the graph before its rewrites, and at which of Dynamo's positions its inputs and its weights are."""
        self._captured, self._order, self._held, self._plan = captured, order, held, plan
        self._passes, self._mode, self._text_tokens = passes, mode, text_tokens
        self._made: dict[tuple[int, ...], _Made] = {}

    def __call__(self, *arguments: Any) -> Sequence[Tensor]:
        """Run the policy whose weights are among `arguments`.

        Raises:
            ValueError: the text is not of the configuration's length.
        """
        text = arguments[self._order[INPUT_NAMES.index("input_ids")]].shape[1]
        if text != self._text_tokens:
            raise ValueError(
                f"input_ids has {text} text tokens, and this policy was compiled for"
                f" text_tokens={self._text_tokens}: pad the prompt to that"
            )
        run = self.prepare(arguments)
        with torch.no_grad():
            result = run(*(arguments[position] for position in self._order))
        return (result,) if isinstance(result, Tensor) else tuple(result)

    def prepare(self, arguments: Sequence[Any]) -> Callable[..., Any]:
        """Return what runs the policy with these weights as they are now, compiled if it is not yet."""
        tensors = tuple(arguments[position] for position in self._held.values())
        key, state = tuple(map(id, tensors)), tuple(map(_state, tensors))
        made = self._made.get(key)
        if made is None or not made.alive or made.state != state:
            check_checkpoint(self._plan, dict(zip(self._held, tensors, strict=True)))
            check_finite(zip(self._held, tensors, strict=True))
            graph = copy_graph(self._captured)
            for name, tensor in zip(self._held, tensors, strict=True):
                replace_tensor(graph, name, tensor.detach())
            propagate(graph)
            for rewrite in self._passes:
                graph, _ = rewrite(graph)
            materialize(graph)
            run = _inductor(graph) if self._mode == "inductor" else graph
            self._made = {known: made for known, made in self._made.items() if made.alive}
            self._made[key] = _Made(tuple(map(weakref.ref, tensors)), state, run)
        return self._made[key].run


@dataclass(frozen=True, slots=True)
class _Made:
    """A policy compiled with one set of weights."""

    tensors: tuple["weakref.ref[Tensor]", ...]
    """The weights; once one is gone, another tensor may get its identity."""
    state: tuple[tuple[int, int | None], ...]
    """What tells that they are as they were."""
    run: Callable[..., Any]
    """Image, input ids, text length and noise -> samples."""

    @property
    def alive(self) -> bool:
        """Whether the weights still exist."""
        return all(tensor() is not None for tensor in self.tensors)


def _state(tensor: Tensor) -> tuple[int, int | None]:
    """Return where a weight's values are and how often they were written; inference tensors do not count the latter."""
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


def _check_call(gm: fx.GraphModule, config: CompileConfig) -> None:
    """Refuse a first call that was not of the configuration's sizes, and a text length that was not kept symbolic."""
    graph = gm.graph
    batch, text = input_node(graph, "input_ids").meta["val"].shape
    if isinstance(text, int):
        raise PassError(
            "the text length was captured as a constant: call the policy itself, whose forward keeps it symbolic, or"
            " mark it before the first call: torch._dynamo.mark_dynamic(input_ids, 1)"
        )
    steps = len(indexed_modules(graph, DENOISING))
    scales = [
        node.args[1]
        for node in graph.nodes
        if is_call(node, aten.mul.Tensor) and module_path(node) == f"{DENOISING}.0.{ACTION_MODEL}.net"
    ]
    found = {"batch_size": int(batch), "ddim_steps": steps, "cfg_scale": float(scales[0]) if scales else 1.0}
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
