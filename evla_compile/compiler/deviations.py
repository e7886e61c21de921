"""Measure the deviation of a compiled policy from the dense one, stage by stage, from the same noise."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.inputs import to_tensors
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.inputs import GraphInputs, observations
from evla_compile.settings.anatomy import COGNITION, SAMPLES
from evla_compile.settings.tolerances import relative_error

if TYPE_CHECKING:
    from evla_compile.compiler.result import CompiledGraph
    from evla_compile.host.frames import Frame
from evla_compile.compiler.report import StageDeviation


@own_torch_state()
def measure_deviations(
    policy: CogACT, compiled: "CompiledGraph", frames: "Sequence[Frame]"
) -> tuple[StageDeviation, ...]:
    """Run both policies on `frames` from the same noise, that of seed 0, and compare them stage by stage."""
    config = compiled.config
    device = next(policy.parameters()).device
    worst = dict.fromkeys(("cognition", "samples", "actions"), 0.0)
    for batch in observations(frames, config.batch_size):
        images, instructions = zip(*batch, strict=True)
        inputs = GraphInputs.prepare(policy.processor, images, instructions, compiled.signature, seed=0)
        found = compiled.outputs(*inputs.arrays, stages=(COGNITION, SAMPLES))
        image, ids, length, start = to_tensors(inputs, device)
        with torch.no_grad():
            cognition = policy.cognition(image, ids, length)
        samples = policy.denoise(cognition, start, ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale)
        dense = {"cognition": cognition.float().cpu().numpy(), "samples": samples.cpu().numpy()}
        for stages in (dense, found):
            stages["actions"] = np.clip(stages["samples"], -1.0, 1.0)
        worst = {stage: max(error, relative_error(found[stage], dense[stage])) for stage, error in worst.items()}
    return tuple(StageDeviation(stage=stage, relative=error, frames=len(frames)) for stage, error in worst.items())
