"""The passes of a configuration and plan, in their order, and `compile_into`, which runs them."""

from collections.abc import Iterable
from dataclasses import replace
from itertools import pairwise
from typing import TypeVar

from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.fingerprint import check_checkpoint
from evla_compile.compiler.deviations import measure_deviations
from evla_compile.compiler.report import CompileReport
from evla_compile.compiler.result import CompiledGraph
from evla_compile.errors import CalibrationError
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
from evla_compile.settings.budgets import kept_layer_count, kept_neurons, resolve, resolve_layers, resolve_tokens
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, plan_without_calibration
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
    config = resolve(config or CompileConfig(), policy.sizes)
    frames = None if calibration is None else as_frames(calibration)
    for frame in frames or ():
        policy.processor.text(frame.instruction, config.text_tokens)  # too long: refused before minutes of calibration
    if plan is not None:
        check_plan(plan, config, policy.sizes)
        check_checkpoint(plan, policy.state_dict())
    elif frames is not None:  # even where all is kept: a later float16 export needs the activation ranges
        plan = calibrate(policy, frames, config, progress=progress)
    else:
        plan = plan_without_calibration(policy.sizes.language, config)
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
        ValueError: a budget does not fit the sizes.
    """
    config = resolve(config, sizes)
    layers, width = sizes.language.layers, sizes.language.mlp_width
    visual_tokens, key_tokens = resolve_tokens(config, sizes.patches)
    passes = (
        UnrollDiffusion(ddim_steps=config.ddim_steps),  # first: from here on, every graph yields samples
        PruneLayers(keep=plan.keep_layers) if len(plan.keep_layers) < layers else None,
        PruneMLP(neurons=tuple(zip(plan.keep_layers, plan.mlp_neurons, strict=True)))
        if kept_neurons(config, width) < width
        else None,  # after the layers, so that no deleted layer is sliced
        SelectTokens(visual_tokens=visual_tokens, key_tokens=key_tokens, task_share=config.task_share)
        if visual_tokens < sizes.patches
        else None,  # behind the second layer of those that stay
        CacheFeatures(interval=config.cache_interval) if config.cache_interval > 1 else None,  # needs the unrolled loop
        NarrowLastLayer(),  # exact, but only the lossy passes decide which layer is last and how long its sequence is
        SpecializeShapes(text_tokens=config.text_tokens),  # after every change of the sequence length
        FoldConstants(),  # last: static sizes make rotary tables and masks constants
    )
    return tuple(rewrite for rewrite in passes if rewrite is not None)


def check_plan(plan: Plan, config: CompileConfig, sizes: ModelSizes) -> None:
    """Refuse a plan for other budgets, by another rule, or for other sizes.

    Its weights are compared by `evla_compile.calibration.fingerprint.check_checkpoint`.

    Raises:
        CalibrationError: the plan differs; the message says in what.
    """
    language = sizes.language
    kept, wanted = resolve_layers(config, language), kept_layer_count(config, language)
    ascending = all(a < b for indices in (plan.keep_layers, *plan.mlp_neurons) for a, b in pairwise(indices))
    if len(plan.keep_layers) != wanted or (isinstance(kept, tuple) and kept != plan.keep_layers) or not ascending:
        raise CalibrationError(
            f"the plan keeps the layers {plan.keep_layers}, the settings ask for keep_layers={kept} in ascending order"
        )
    if plan.keep_layers[-1] >= language.layers:
        raise CalibrationError(f"the plan keeps layer {plan.keep_layers[-1]}, the decoder has {language.layers} layers")
    placed = wanted < language.layers and not isinstance(kept, tuple)
    # in a plan without frames nothing was chosen by a rule, so it fits any: see `stand_in_plan`
    if plan.frames and placed and plan.layer_rule != config.layer_rule:
        chosen = "were named" if plan.layer_rule is None else f"were chosen by layer_rule={plan.layer_rule!r}"
        raise CalibrationError(
            f"the plan's layers {chosen}, the settings ask for layer_rule={config.layer_rule!r}: calibrate again with"
            f" these settings, set the plan's rule, or name its layers, keep_layers={plan.keep_layers}"
        )
    count = kept_neurons(config, language.mlp_width)
    found = sorted({len(neurons) for neurons in plan.mlp_neurons})
    expected = [] if count == language.mlp_width else [count]
    if found != expected or (expected and len(plan.mlp_neurons) != len(plan.keep_layers)):
        raise CalibrationError(
            f"the plan keeps {found or 'all'} MLP neurons in {len(plan.mlp_neurons)} layers, the settings ask for"
            f" {expected or 'all'} (mlp_keep={config.mlp_keep}) in {len(plan.keep_layers)}"
        )
    if any(neurons[-1] >= language.mlp_width for neurons in plan.mlp_neurons):
        raise CalibrationError(f"the plan names an MLP neuron beyond the decoder's {language.mlp_width}")
