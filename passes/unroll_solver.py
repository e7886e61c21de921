"""Unroll the captured denoising step into a solver of second order, which needs fewer steps."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from evla_compile.graph.contract import GraphPass, inserting
from evla_compile.graph.denoising_step import CapturedStep, mark_denoised
from evla_compile.settings.anatomy import COGACT
from evla_compile.settings.schedule import check_timesteps, solver_schedule

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class UnrollSolver(GraphPass):
    """Copy the captured denoising step once for each of a few timesteps: DPM-Solver++(2M) in place of DDIM, lossy.

    Not in EfficientVLA. DPM-Solver++ (arXiv 2211.01095) of second order, multistep: a step predicts the actions
    d = p x + q eps(x, t), and goes on with x <- A x + B eps + C d', d' the prediction of the step in front of it, x, d
    float32 [B,A,F]; all coefficients are folded to constants (see `evla_compile.settings.schedule`). The samples are
    the d of the last step. Lossy, since its samples are others than those of the DDIM steps with which the policy is
    evaluated. Copies and module paths are those of `UnrollDiffusion`. Refuses a graph without the `timestep` input,
    which is unrolled already, and timesteps that do not descend.
    """

    exact: ClassVar[bool] = False

    timesteps: tuple[int, ...]
    """Indices on the training schedule, descending."""

    def __post_init__(self) -> None:
        check_timesteps("timesteps", self.timesteps)

    def rewrite(self, gm: fx.GraphModule) -> int:
        """Replace the noise prediction, the graph's output, by the samples."""
        captured = CapturedStep(gm)
        x, earlier = captured.noise, None
        for number, step in enumerate(solver_schedule(self.timesteps)):
            predicted = captured.copy(x, step.timestep, number)
            with inserting(gm.graph, captured.output, f"{COGACT.denoising}.{number}") as proxy:
                noisy, noise = proxy(x), proxy(predicted)  # [B,A,F] each
                following = aten.add.Tensor(aten.mul.Tensor(noisy, step.sample), aten.mul.Tensor(noise, step.noise))
                if earlier is not None and step.earlier != 0.0:
                    following = aten.add.Tensor(following, aten.mul.Tensor(proxy(earlier), step.earlier))
                data = aten.add.Tensor(  # dead, and removed, where the next step does not read it
                    aten.mul.Tensor(noisy, step.data_sample), aten.mul.Tensor(noise, step.data_noise)
                )
            x, earlier = following.node, data.node
            mark_denoised(x, number)
        captured.replace(x)
        return len(self.timesteps)
