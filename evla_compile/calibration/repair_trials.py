"""Try repairs on some episodes, judge them by the actions on others, and take the best, unrepaired weights too."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from evla_compile.calibration.decoder_passes import decoder_passes
from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.held_out import Split
from evla_compile.calibration.progress import CalibrationProgress
from evla_compile.calibration.repair import Repair, RowWeights, Trial
from evla_compile.calibration.streams import Batch, Shelf, Stream
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.run_passes import run_passes
from evla_compile.host.inputs import draw_noise
from evla_compile.settings.budgets.budget import Decision
from evla_compile.settings.budgets.repair import (
    REPAIR_RHOS,
    REPAIR_SCOPES,
    RepairDecision,
    RepairTrial,
)
from evla_compile.settings.config import CompileConfig


class RepairTrials:
    """Called with the decisions of the techniques in front of the repair, returns that of the repair.

    Attributes:
        tensors: refit weights of the repair that was taken, by module path; empty where none was.
    """

    def __init__(
        self,
        policy: CogACT,
        graph: fx.GraphModule,
        batches: Sequence[Batch],
        split: Split,
        config: CompileConfig,
        shelf: Shelf,
    ) -> None:
        """Take what the repairs need.

        Args:
            policy: the dense policy.
            graph: its noise prediction.
            batches: all frames.
            split: which of them are fitted on, and which decide.
            config: the budgets.
            shelf: where streams and solved weights are kept.
        """
        self._policy, self._graph, self._batches, self._config, self._shelf = policy, graph, batches, config, shelf
        self._split = split
        self.tensors: Mapping[str, Tensor] = {}

    def prepare(self, run: DenseRun, start: Stream, features: Tensor, bar: CalibrationProgress) -> None:
        """Take what the measurements of the dense policy leave.

        Args:
            run: the dense policy.
            start: its stream in front of the decoder.
            features: its cognition features, float32 [F,D].
            bar: draws progress.
        """
        self._run, self._start, self._features, self._bar = run, start, features, bar

    def __call__(self, decisions: Sequence[Decision]) -> RepairDecision:
        """Repair in all ways that the settings allow, and return the best on the held-out frames.

        Raises:
            CalibrationError: a fit has no finite solution, or the actions are not finite.
        """
        config, split = self._config, self._split
        decided = (*decisions, RepairDecision())
        passes = decoder_passes(decided, self._policy.sizes, {})
        compressed, _ = run_passes(self._graph, [rewrite for rewrite in passes if rewrite is not None])
        visual, text, cognition = config.repair_weights
        weights = RowWeights(visual=visual, text=text, cognition=cognition)
        repair = Repair(compressed, self._run, self._batches, split.fitted, weights, self._shelf)
        trials = self._trials(repair)
        features = repair.run(trials, self._start.fork("dense"), self._bar.step("Repairing layers", len(repair.layers)))
        deviations = {trial: self._deviation(features[trial]) for trial in trials}
        best = min(trials, key=lambda trial: deviations[trial])  # the first among equals: the least change
        self.tensors = repair.tensors(best)
        return RepairDecision(
            scope=best.scope,
            rho=best.rho,
            layers=tuple(each.layer.index for place, each in enumerate(repair.layers) if repair.refits(best, place)),
            trials=tuple(RepairTrial(scope=t.scope, rho=t.rho, deviation=deviations[t]) for t in trials),
            fitted=len(split.fitted),
            held_out=len(split.held_out),
            warnings=split.warnings,
        )

    def _trials(self, repair: Repair) -> list[Trial]:
        """Return no repair, then every scope from the narrowest up to that of the settings, with every rho."""
        rho = self._config.repair_rho
        scopes = REPAIR_SCOPES[1 : REPAIR_SCOPES.index(self._config.repair) + 1]
        found = [Trial(scope="none", rho=0.0)]
        seen: set[tuple[int, ...]] = {()}
        for scope in scopes:
            layers = tuple(
                place for place in range(len(repair.layers)) if repair.refits(Trial(scope=scope, rho=1.0), place)
            )
            if layers not in seen:  # a scope may be the same as a narrower one
                seen.add(layers)
                found += [Trial(scope=scope, rho=each) for each in ((rho,) if rho is not None else REPAIR_RHOS)]
        return found

    def _deviation(self, features: Tensor) -> float:
        """Return the action deviation on the held-out frames, for cognition features [F,D]."""
        places = sorted(self._split.held_out)
        return action_deviation(self._policy, features[places], self._features[places], places, self._config)


def action_deviation(
    policy: CogACT, features: Tensor, dense: Tensor, seeds: Sequence[int], config: CompileConfig
) -> float:
    """Return how far actions are from the dense policy's, with the dense action head and from equal noise.

    It is the mean, over frames, steps of the chunk and action dimensions, of the absolute difference of normalised
    actions clipped to [-1,1].

    Args:
        policy: the dense policy.
        features: cognition features, float32 [F,D].
        dense: the dense policy's, float32 [F,D].
        seeds: seed of the noise of each frame.
        config: denoising steps and guidance.

    Raises:
        CalibrationError: an action is not finite.
    """
    action = policy.sizes.action
    shape = (action.chunk, action.action_width)
    noise = torch.stack([torch.from_numpy(draw_noise(shape, seed)) for seed in seeds]).to(features.device)
    dtype = next(policy.action_model.parameters()).dtype
    denoise = partial(policy.denoise, noise=noise, ddim_steps=config.ddim_steps, cfg_scale=config.cfg_scale)
    found, expected = (denoise(each[:, None].to(dtype)).clamp(-1.0, 1.0) for each in (features, dense))  # [F,A,7]
    deviation = float((found - expected).abs().mean())
    if not math.isfinite(deviation):
        raise CalibrationError("the actions on the calibration frames are not finite: the checkpoint may be damaged")
    return deviation
