"""The passes of a configuration and plan, in their order, and `compile_into`, which runs them."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TypeVar

from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.fingerprint import check_checkpoint
from evla_compile.compiler.deviations import measure_deviations
from evla_compile.compiler.report import CompileReport
from evla_compile.compiler.result import CompiledGraph
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.finite_weights import check_finite_policy
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame, as_frames
from evla_compile.passes import (
    CacheFeatures,
    FoldConstants,
    NarrowLastLayer,
    PruneLayers,
    PruneMLP,
    SelectTokens,
    SpecializeShapes,
    UnrollDiffusion,
)
from evla_compile.settings.budgets.budget import D, decision_of
from evla_compile.settings.budgets.cache import CacheDecision
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.budgets.mlp import MLPDecision
from evla_compile.settings.budgets.tokens import TokenDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, check_plan, plan_without_calibration
from evla_compile.settings.sizes import ModelSizes

COMPARED_FRAMES = 2
"""Calibration frames on which the compiled policy is compared with the dense one, and its exports with itself."""

Compiled = TypeVar("Compiled", bound=CompiledGraph)


@own_torch_state()
def compile_into(
    kind: type[Compiled],
    policy: CogACT,
    config: CompileConfig | None = None,
    *,
    calibration: Iterable[Frame] | None = None,
    plan: Plan | None = None,
    progress: bool = True,
) -> Compiled:
    """Compile a policy and return it as an instance of `kind`; otherwise as `evla_compile.compile`."""
    config = (config or CompileConfig()).resolve(policy.sizes)
    frames = None if calibration is None else as_frames(calibration)
    for frame in frames or ():
        policy.processor.text(frame.instruction, config.text_tokens)  # too long: refused before minutes of calibration
    if plan is not None:
        check_plan(plan, config, policy.sizes)
        check_checkpoint(plan, policy.state_dict())
    elif frames is not None:  # even where all is kept: a later float16 export needs the activation ranges
        plan = calibrate(policy, frames, config, progress=progress)
    else:
        plan = plan_without_calibration(policy.sizes, config)
    check_finite_policy(policy)
    graph, reports = run_passes(capture(policy, config), build_passes(config, plan, policy.sizes))
    compiled = kind(
        graph=graph,
        config=config,
        plan=plan,
        sizes=policy.sizes,
        processor=policy.processor,
        report=CompileReport(config=config, passes=reports, deviations=()),
        frames=tuple(frames or ())[:COMPARED_FRAMES],
    )
    if compiled.frames:
        compiled.report = replace(compiled.report, deviations=measure_deviations(policy, compiled, compiled.frames))
    return compiled


def build_passes(config: CompileConfig, plan: Plan, sizes: ModelSizes) -> tuple[GraphPass, ...]:
    """Return the rewrites of a configuration and its plan, in their order; those without work are left out.

    Raises:
        CalibrationError: the plan is of another configuration, or of other sizes.
        ValueError: a budget does not fit the sizes.
    """
    config = config.resolve(sizes)
    check_plan(plan, config, sizes)
    decisions = config.complete(plan.decisions, sizes)

    def lossy(kind: type[D], build: Callable[[D], GraphPass]) -> GraphPass | None:
        """Return the pass of a technique by its decision, none where that is idle."""
        decision = decision_of(kind, decisions)
        return None if decision.idle(sizes) else build(decision)

    passes = (
        UnrollDiffusion(ddim_steps=config.ddim_steps),  # first: from here on, every graph yields samples
        lossy(LayerDecision, lambda layers: PruneLayers(keep=layers.keep)),
        lossy(MLPDecision, lambda mlp: PruneMLP(neurons=mlp.neurons)),  # after the layers: none that goes is sliced
        lossy(  # behind the second layer of those that stay
            TokenDecision,
            lambda tokens: SelectTokens(
                visual_tokens=tokens.visual_tokens, key_tokens=tokens.key_tokens, task_share=tokens.task_share
            ),
        ),
        lossy(CacheDecision, lambda cache: CacheFeatures(interval=cache.interval)),  # needs the unrolled loop
        NarrowLastLayer(),  # exact, but only the lossy passes decide which layer is last and how long its sequence is
        SpecializeShapes(text_tokens=config.text_tokens),  # after every change of the sequence length
        FoldConstants(),  # last: static sizes make rotary tables and masks constants
    )
    return tuple(rewrite for rewrite in passes if rewrite is not None)
