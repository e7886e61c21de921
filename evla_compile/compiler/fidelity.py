"""Measure the fidelity of a compilation on all its frames: both policies run layer by layer, each weight read once.

What is run is the graph before its shapes become static, on prompts that are not padded: static shapes, folded
constants and padding are exact rewrites.

Shape legend: R draws of noise, F frames, A action steps, W action dimensions, D width of the cognition feature.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from evla_compile.calibration.cache_search import CachedRun
from evla_compile.calibration.forecast import stream_bytes
from evla_compile.calibration.progress import CalibrationProgress
from evla_compile.calibration.solver_search import SolverRun
from evla_compile.calibration.streams import Batch, Stream, batches_of, in_frame_order, open_shelf
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.fidelity.chunks import DRAWS, ActionChunks, check_draws, digest_frames, frame_noise
from evla_compile.fidelity.measure import HORIZON, Fidelity, compare_chunks
from evla_compile.graph.sites import decoder_layers, stage_node
from evla_compile.graph.walk import GraphWalk
from evla_compile.host.frames import Frame
from evla_compile.settings.anatomy import COGNITION
from evla_compile.settings.budgets.budget import Decision, decision_of
from evla_compile.settings.budgets.cache import CacheDecision
from evla_compile.settings.budgets.sampler import SamplerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.schedule import DDIM_STEPS

_ROWS = 256  # of frames and noises that the action head computes at once


def dense_chunks(
    policy: CogACT,
    frames: Sequence[Frame],
    captured: fx.GraphModule,
    bar: CalibrationProgress,
    *,
    draws: int = DRAWS,
    cfg_scale: float,
    features: Tensor | None = None,
) -> ActionChunks:
    """Run the dense policy with the sampler that it is published with, 10 steps of DDIM.

    Args:
        policy: the policy.
        frames: observations.
        captured: its graph.
        bar: draws progress.
        draws: noises of each frame.
        cfg_scale: guidance.
        features: its cognition features [F,D], where they are known already.

    Raises:
        ValueError: there are no frames, or `draws` is out of range.
        EvlaError: a sample is not finite.
    """
    check_draws(draws, frames)
    if features is None:
        features = cognition_features(policy, captured, frames, bar, "Running the dense policy")
    samples = _samples(
        policy,
        features,
        draws,
        lambda condition, noise: policy.denoise(condition, noise, ddim_steps=DDIM_STEPS, cfg_scale=cfg_scale),
    )
    return ActionChunks(samples=samples, frames=digest_frames(policy.processor, frames))


def measure_compilation(
    policy: CogACT,
    frames: Sequence[Frame],
    captured: fx.GraphModule,
    rewritten: fx.GraphModule,
    config: CompileConfig,
    decisions: Sequence[Decision],
    bar: CalibrationProgress,
    features: Tensor | None,
) -> Fidelity | None:
    """Return the fidelity of a compilation, in the units of the policy's first dataset by name; None without any.

    Args:
        policy: the dense policy, whose action head both have.
        frames: observations.
        captured: its graph.
        rewritten: its graph after the lossy passes in front of the action head, its sequence length symbolic.
        config: the settings.
        decisions: those of all techniques.
        bar: draws progress.
        features: the dense policy's cognition features [F,D], where they are known already.

    Raises:
        EvlaError: a sample is not finite.
    """
    known = policy.processor.statistics
    if not known:
        return None  # such a policy has samples, and no actions
    dense = dense_chunks(policy, frames, captured, bar, cfg_scale=config.cfg_scale, features=features)
    timesteps = decision_of(SamplerDecision, decisions).timesteps
    steps = decision_of(CacheDecision, decisions).steps or tuple(range(config.ddim_steps))

    def denoise(condition: Tensor, noise: Tensor) -> Tensor:
        if timesteps:
            return SolverRun(policy, config, condition, noise).samples(timesteps)
        return CachedRun(policy, config, condition, noise).samples(steps)

    compiled = cognition_features(policy, rewritten, frames, bar, "Running the compiled policy")
    found = ActionChunks(samples=_samples(policy, compiled, DRAWS, denoise), frames=dense.frames)
    horizon = min(HORIZON, policy.sizes.action.chunk)
    return compare_chunks(dense, found, known[min(known)], frames, horizon=horizon)


def cognition_features(
    policy: CogACT, graph: fx.GraphModule, frames: Sequence[Frame], bar: CalibrationProgress, text: str
) -> Tensor:
    """Return the cognition feature of every frame, float32 [F,D], as a graph with a symbolic sequence length has it."""
    batches: tuple[Batch, ...] = batches_of(policy, frames)
    readout = stage_node(graph.graph, COGNITION)
    walk = GraphWalk(graph, [*(layer.exit for layer in decoder_layers(graph.graph)), readout])
    with open_shelf(None, stream_bytes(policy, batches, 0)) as shelf:
        stream = Stream.start(walk, batches, shelf, "fidelity")
        stream.advance(readout, tick=bar.step(text, len(walk.stretches)))
        return in_frame_order(batches, [values[readout.name] for _, values in stream])


def _samples(
    policy: CogACT, features: Tensor, draws: int, denoise: Callable[[Tensor, Tensor], Tensor]
) -> NDArray[np.float32]:
    """Run the action head on cognition features [F,D], and return raw samples [R,F,A,W]."""
    action, dtype = policy.sizes.action, next(policy.action_model.parameters()).dtype
    shape = (action.chunk, action.action_width)
    noise = np.stack([frame_noise(place, draws, shape) for place in range(len(features))])  # [F,R,A,W]
    rows = torch.from_numpy(noise).flatten(0, 1).to(features.device)  # [F*R,A,W]
    conditions = features.to(dtype)[:, None].repeat_interleave(draws, dim=0)  # [F*R,1,D]
    with torch.no_grad():
        parts = [
            denoise(conditions[first : first + _ROWS], rows[first : first + _ROWS])
            for first in range(0, len(rows), _ROWS)
        ]
    samples = torch.cat(parts).reshape(len(features), draws, *shape).transpose(0, 1)  # [R,F,A,W]
    found: NDArray[np.float32] = samples.float().cpu().numpy()
    return found
