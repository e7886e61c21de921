"""Try repairs on some episodes, judge them by the actions on others, and take the best, unrepaired weights too."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, fx

from evla_compile.calibration.activation_ranges import ActivationRanges
from evla_compile.calibration.decoder_passes import decoder_passes
from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.held_out import Split
from evla_compile.calibration.kept_layer import RowWeights
from evla_compile.calibration.progress import CalibrationProgress
from evla_compile.calibration.repair import Repair, Trial
from evla_compile.calibration.resumption import Resumption
from evla_compile.calibration.streams import Stream
from evla_compile.calibration.vision_cut import VisionCut
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import stage_node
from evla_compile.graph.walk import GraphWalk
from evla_compile.host.inputs import draw_noise
from evla_compile.settings.anatomy import COGNITION
from evla_compile.settings.budgets.budget import Decision
from evla_compile.settings.budgets.repair import (
    RepairDecision,
    RepairTrial,
)
from evla_compile.settings.config import CompileConfig


class RepairTrials:
    """Called with the decisions of the techniques in front of the repair, returns that of the repair.

    Attributes:
        tensors: refit weights of the repair that was taken, by module path; empty where none was.
        ranges: the largest activations of the compressed policy as it was repaired, by module path.
    """

    def __init__(
        self,
        policy: CogACT,
        run: DenseRun,
        start: Stream,
        features: Tensor,
        split: Split,
        config: CompileConfig,
        resumption: Resumption,
        bar: CalibrationProgress,
        vision: VisionCut | None,
    ) -> None:
        """Take what the measurements of the dense policy leave.

        Args:
            policy: the dense policy.
            run: its run over all frames.
            start: its stream in front of the decoder.
            features: its cognition features, float32 [F,D].
            split: which frames are fitted on, and which decide.
            config: the settings.
            resumption: records every finished layer.
            bar: draws progress.
            vision: what cuts the vision towers; None where they are left alone.
        """
        self._policy, self._run, self._start, self._features = policy, run, start, features
        self._split, self._config, self._resumption, self._bar = split, config, resumption, bar
        self._vision = vision
        self.tensors: Mapping[str, Tensor] = {}
        self.ranges: Mapping[str, float] = {}

    def __call__(self, decisions: Sequence[Decision]) -> RepairDecision:
        """Repair in all ways that the settings allow, and return the best on the held-out frames.

        Raises:
            CalibrationError: a fit has no finite solution, or the actions are not finite.
        """
        config, split = self._config, self._split
        compressed = self._rewritten((*decisions, RepairDecision()))
        visual, text, cognition = config.repair_weights
        weights = RowWeights(visual=visual, text=text, cognition=cognition)
        repair = Repair(compressed, self._run, split.fitted, weights, self._resumption)
        trials = self._trials(repair)
        tick = self._bar.step("Repairing layers", len(repair.layers))
        features = repair.run(trials, self._start, tick, self._compressed)
        deviations = {trial: self._deviation(features[trial]) for trial in trials}
        best = min(trials, key=lambda trial: deviations[trial])  # the first among equals: the least change
        self.tensors = repair.tensors(best)
        for trial in trials:
            if trial != best:
                repair.forget(trial)
        decision = RepairDecision(
            scope=best.scope,
            rho=best.rho,
            layers=tuple(each.layer.index for place, each in enumerate(repair.layers) if repair.refits(best, place)),
            trials=tuple(RepairTrial(scope=t.scope, rho=t.rho, deviation=deviations[t]) for t in trials),
            fitted=len(split.fitted),
            held_out=len(split.held_out),
            warnings=split.warnings,
        )
        self._measure_ranges((*decisions, decision))
        return decision

    @property
    def _compressed(self) -> Stream:
        """The compressed policy's stream in front of the decoder."""
        return self._start if self._vision is None or self._vision.front is None else self._vision.front

    def _rewritten(self, decisions: Sequence[Decision]) -> fx.GraphModule:
        """Return the policy's graph with its decoder compressed."""
        passes = decoder_passes(decisions, self._policy.sizes, self.tensors)
        graph, _ = run_passes(self._run.graph, [rewrite for rewrite in passes if rewrite is not None])
        return graph

    def _measure_ranges(self, decisions: Sequence[Decision]) -> None:
        """Run the compressed decoder as it was chosen, since its activations are other ones than the dense policy's."""
        gm = self._rewritten(decisions)
        ranges = ActivationRanges(gm.graph)
        front, readout = self._run.front_in(gm.graph), stage_node(gm.graph, COGNITION)
        stream = self._compressed.onto(GraphWalk(gm, [front, readout]), front, "compressed")
        tick = self._bar.step("Measuring activations", len(stream.walk.stretches) - stream.done)
        stream.advance(readout, lambda _: ranges.watch(), tick)
        stream.close()
        self.ranges = ranges.found()

    def _trials(self, repair: Repair) -> list[Trial]:
        """Return no repair, then every scope from the narrowest up to that of the settings, with every rho."""
        found = [Trial(scope="none", rho=0.0)]
        seen: set[tuple[int, ...]] = {()}
        for scope in self._config.repair_scopes:
            layers = tuple(
                place for place in range(len(repair.layers)) if repair.refits(Trial(scope=scope, rho=1.0), place)
            )
            if layers not in seen:  # a scope may be the same as a narrower one
                seen.add(layers)
                found += [Trial(scope=scope, rho=each) for each in self._config.repair_strengths]
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
