"""Unroll the captured denoising step into the whole sampler."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.graph.contract import GraphPass, inserting
from evla_compile.graph.denoising_step import CapturedStep, mark_denoised
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.schedule import ddim_schedule

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class UnrollDiffusion(GraphPass):
    """Copy the captured denoising step `ddim_steps` times with constant timesteps, exact: the DDIM sampler, eta 0.

    CogACT samples x <- A x + B eps(x, t), x float32 [B,A,F], both coefficients folded to constants (see
    `evla_compile.settings.schedule`); EfficientVLA section 3.4 caches features across these steps. What does not depend
    on the noisy actions or on the timestep is not copied: the cognition feature is embedded once, in front of them.
    Step k becomes the module path `denoising.k.…`. Refuses a graph without the `timestep` input, which is unrolled
    already.
    """

    exact: ClassVar[bool] = True

    ddim_steps: int
    """Denoising steps; a count that an integer stride over the training schedule yields."""

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the noise prediction, the graph's output, by the samples."""
        captured = CapturedStep(gm)
        x = captured.noise
        for number, step in enumerate(ddim_schedule(self.ddim_steps)):
            predicted = captured.copy(x, step.timestep, number)
            with inserting(gm.graph, captured.output, f"{COGACT.denoising}.{number}") as proxy:
                scaled = aten.mul.Tensor(proxy(x), step.sample)
                x = aten.add.Tensor(scaled, aten.mul.Tensor(proxy(predicted), step.noise)).node
            mark_denoised(x, number)
        captured.replace(x)
        return self.ddim_steps
