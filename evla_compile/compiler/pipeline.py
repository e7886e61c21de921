"""The passes of a configuration and plan, in their order, and `compile_into`, which runs them."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from evla_compile.calibration.calibrate import measure
from evla_compile.calibration.decoder_passes import decoder_passes, lossy_pass
from evla_compile.calibration.fingerprint import check_checkpoint
from evla_compile.calibration.progress import drawing_progress
from evla_compile.compiler.deviations import measure_deviations
from evla_compile.compiler.fidelity import measure_compilation
from evla_compile.compiler.report import CompileReport, RepairReport, VisionReport
from evla_compile.compiler.result import CompiledGraph
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.contract import GraphPass
from evla_compile.graph.finite_weights import check_finite_policy
from evla_compile.graph.plan_tensors import to_tensor
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame, as_frames
from evla_compile.passes import (
    CacheFeatures,
    FoldConstants,
    NarrowLastLayer,
    PruneVision,
    SpecializeShapes,
    UnrollDiffusion,
    UnrollSolver,
)
from evla_compile.settings.budgets.budget import Decision
from evla_compile.settings.budgets.cache import CacheDecision
from evla_compile.settings.budgets.sampler import SamplerDecision
from evla_compile.settings.budgets.vision import VisionDecision
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
    scratch: str | os.PathLike[str] | None = None,
) -> Compiled:
    """Compile a policy and return it as an instance of `kind`; otherwise as `evla_compile.compile`."""
    config = (config or CompileConfig()).resolve(policy.sizes)
    frames = None if calibration is None else as_frames(calibration)
    for frame in frames or ():
        policy.processor.text(frame.instruction, config.text_tokens)  # too long: refused before minutes of calibration
    if plan is not None:
        check_plan(plan, config, policy.sizes)
        check_checkpoint(plan, policy.state_dict())
    elif frames is None:
        plan = plan_without_calibration(policy.sizes, config)
    if plan is None:  # even where all is kept: a later float16 export needs the activation ranges
        plan, captured, dense = measure(policy, frames or (), config, progress=progress, scratch=scratch)
    else:
        check_finite_policy(policy)
        captured, dense = capture(policy, config), None
    graph, reports = run_passes(captured, build_passes(config, plan, policy.sizes))
    compiled = kind(
        graph=graph,
        config=config,
        plan=plan,
        sizes=policy.sizes,
        processor=policy.processor,
        report=CompileReport(
            config=config,
            passes=reports,
            deviations=(),
            repair=RepairReport.of(plan),
            vision=VisionReport.of(plan),
        ),
        frames=tuple(frames or ())[:COMPARED_FRAMES],
    )
    if frames:
        decisions = config.complete(plan.decisions, policy.sizes)
        perception, _ = run_passes(captured, _perception_passes(decisions, plan, policy.sizes))
        with drawing_progress(wanted=progress) as bar:
            fidelity = measure_compilation(policy, frames, captured, perception, config, decisions, bar, dense)
        compiled.report = replace(
            compiled.report,
            deviations=measure_deviations(policy, compiled, compiled.frames),
            fidelity=fidelity,
        )
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

    solver = lossy_pass(decisions, sizes, SamplerDecision, lambda s: UnrollSolver(timesteps=s.timesteps))
    sampler = solver or UnrollDiffusion(ddim_steps=config.ddim_steps)
    passes = (
        sampler,  # first: from here on, every graph yields samples
        *_perception_passes(decisions, plan, sizes),
        lossy_pass(  # of the unrolled loop
            decisions, sizes, CacheDecision, lambda c: CacheFeatures(steps=c.steps, extrapolate=c.extrapolate)
        ),
        NarrowLastLayer(),  # exact, but only the lossy passes decide which layer is last and how long its sequence is
        SpecializeShapes(text_tokens=config.text_tokens),  # after every change of the sequence length
        FoldConstants(),  # last: static sizes make rotary tables and masks constants
    )
    return tuple(rewrite for rewrite in passes if rewrite is not None)


def _perception_passes(decisions: Sequence[Decision], plan: Plan, sizes: ModelSizes) -> tuple[GraphPass, ...]:
    """Return the lossy rewrites in front of the action head."""
    tensors = {name: to_tensor(tensor) for name, tensor in plan.tensors.items()}
    vision = lossy_pass(
        decisions,
        sizes,
        VisionDecision,
        lambda v: PruneVision(neurons={b.path: b.neurons for b in v.blocks}, refit=v.refit, tensors=tensors),
    )
    passes = (vision, *decoder_passes(decisions, sizes, tensors))
    return tuple(rewrite for rewrite in passes if rewrite is not None)
