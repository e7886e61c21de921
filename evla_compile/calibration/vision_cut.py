"""Cut the MLPs of the vision towers, and refit what is left of each in closed form, block by block.

Of every block those neurons stay whose activation varies most, weighted by what they add: the standard deviation over
all tokens of all frames times the norm of the neuron's column of the second layer. The mean of those that go is made up
for by the bias. Then, with a what leaves the block's attention in the cut tower, m the activations of the neurons that
stay, g the vector that scales the MLP's output, and T what leaves the block in the dense tower, a ridge regression of
(T - a) / g - m W^T - b on m changes W and b, the second layer. The penalty is on the change. Several strengths are
tried, and that is taken which leaves the block nearest to T on the held-out frames; the weights as they were, if that
is best. The next block is fitted to what this one yields.

Shape legend: B batch, N tokens of a tower, D its width, M neurons.
"""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from evla_compile.calibration.activation_ranges import ActivationRanges
from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.held_out import Split
from evla_compile.calibration.progress import CalibrationProgress
from evla_compile.calibration.resumption import Resumption
from evla_compile.calibration.ridge import RidgeRegression
from evla_compile.calibration.streams import Batch, Stream
from evla_compile.errors import CalibrationError
from evla_compile.graph.contract import get_tensor
from evla_compile.graph.deferred import materialized
from evla_compile.graph.run_passes import run_passes
from evla_compile.graph.sites import VisionBlock, argument, stage_node, vision_blocks
from evla_compile.graph.walk import GraphWalk, Values
from evla_compile.passes import PruneVision
from evla_compile.settings.anatomy import COGNITION
from evla_compile.settings.budgets.mlp import highest
from evla_compile.settings.budgets.vision import CutBlock, VisionDecision

RHOS = (0.0001, 0.001, 0.01, 0.1, 1.0)
"""Strengths of the penalty that are tried. Every token of an image is a row, so that weaker ones serve than for the
decoder's layers."""


class VisionCut:
    """Called with how many neurons stay in each tower, cuts and refits its blocks, and returns the decision.

    Attributes:
        tensors: second layers that were refit, by module path; empty before the call.
        ranges: the largest activations of the towers as they were cut, by module path.
        front: the stream of the cut policy in front of the decoder; None before the call.
    """

    def __init__(
        self,
        run: DenseRun,
        scores: Mapping[str, NDArray[np.float32]],
        split: Split,
        resumption: Resumption,
        bar: CalibrationProgress,
    ) -> None:
        """Take what the measurements of the dense policy leave.

        Args:
            run: the dense run.
            scores: score of every neuron, float32 [M], by the module path of the block.
            split: which frames are fitted on, and which decide.
            resumption: records every finished block.
            bar: draws progress.
        """
        self._run, self._scores, self._split = run, scores, split
        self._resumption, self._bar = resumption, bar
        self.tensors: Mapping[str, Tensor] = {}
        self.ranges: Mapping[str, float] = {}
        self.front: Stream | None = None

    def __call__(self, counts: Mapping[str, int]) -> VisionDecision:
        """Cut the towers, and refit their blocks.

        Args:
            counts: neurons that stay in every block, by the module path of the tower.

        Raises:
            CalibrationError: a fit has no finite solution.
        """
        kept = {
            path: highest(scores, counts[tower])
            for path, scores in self._scores.items()
            if (tower := path.rpartition(".blocks.")[0]) in counts
        }
        fit = _Fit(self._run, kept, self._split, self._resumption)
        blocks = fit.run(self._bar.step("Cutting vision", len(kept)))
        self.tensors = fit.tensors(blocks)
        decision = VisionDecision(blocks=tuple(blocks))
        self._run_cut(PruneVision(neurons=kept, refit=decision.refit, tensors=self.tensors))
        return decision

    def _run_cut(self, rewrite: PruneVision) -> None:
        """Run the towers as they were cut, for what enters the decoder now, and for their activations."""
        run = self._run
        gm, _ = run_passes(run.graph, [rewrite])
        front, readout = run.front_in(gm.graph), stage_node(gm.graph, COGNITION)
        ranges = ActivationRanges(gm.graph)
        walk = GraphWalk(gm, [front, readout])
        stream = self._resumption.stream(walk, run.batches, "cut") or Stream.start(walk, run.batches, run.shelf, "cut")
        if (earlier := self._resumption.measures("cut")) is not None:
            ranges.restore(dict(zip(sorted(ranges.state()), earlier["ranges"].tolist(), strict=True)))
        advanced = self._bar.step("Running the cut towers", walk.count_to(front) - stream.done)

        def tick() -> None:
            seen = ranges.state()
            state = torch.tensor([seen[name] for name in sorted(seen)], dtype=torch.float64)
            self._resumption.record_stream(stream, lambda: {"ranges": state})
            advanced()

        stream.advance(front, lambda _: ranges.watch(), tick)
        self.ranges, self.front = ranges.found(), stream


class _Fit:
    """Advances the dense and the cut towers side by side, and refits the blocks."""

    def __init__(
        self, run: DenseRun, kept: Mapping[str, tuple[int, ...]], split: Split, resumption: Resumption
    ) -> None:
        self._run, self._kept, self._split, self._resumption = run, kept, split, resumption
        self._gm, _ = run_passes(run.graph, [PruneVision(neurons=kept)])
        # the goals are what leaves the dense blocks, in the order in which the graph computes them
        self._dense, self._blocks = (
            [b for b in vision_blocks(g.graph) if b.path in kept] for g in (run.graph, self._gm)
        )
        self._target_walk = GraphWalk(run.graph, [block.exit for block in self._dense])
        self._walk = GraphWalk(self._gm, [node for block in self._blocks for node in (block.neurons, block.exit)])

    def run(self, tick: Callable[[], None]) -> list[CutBlock]:
        """Refit all blocks, from where an earlier run was interrupted."""
        batches, shelf = self._run.batches, self._run.shelf
        reached = self._resumption.reached("vision")
        if reached is None:
            target = Stream.start(self._target_walk, batches, shelf, "vision-target")
            stream, found = Stream.start(self._walk, batches, shelf, "vision-cut"), []
        else:
            target = Stream(self._target_walk, batches, shelf, "vision-target", reached["target"])
            stream = Stream(self._walk, batches, shelf, "vision-cut", reached["cut"])
            found = [*VisionDecision.from_json({"vision": reached["blocks"] or None}, ()).blocks]
        for place, (dense, block) in enumerate(zip(self._dense, self._blocks, strict=True)):
            if place >= len(found):
                target.advance(dense.exit)
                found.append(self._refit(block, dense, stream, target))
                entries = {*target.entries, *stream.entries, *(f"vision-{each.path}" for each in found if each.rho)}
                done = VisionDecision(blocks=tuple(found)).to_json()["vision"]
                self._resumption.record("vision", {"blocks": done, "target": target.done, "cut": stream.done}, entries)
            tick()
        target.close()
        stream.close()
        return found

    def tensors(self, blocks: Sequence[CutBlock]) -> dict[str, Tensor]:
        """Return the refit weights, by module path."""
        found: dict[str, Tensor] = {}
        for block in blocks:
            if block.rho:
                values = self._run.shelf.read(f"vision-{block.path}", self._run.batches[0].image.device)
                found |= {f"{block.path}.mlp.fc2.{name}": tensor for name, tensor in values.items()}
        return found

    def _refit(self, block: VisionBlock, dense: VisionBlock, stream: Stream, target: Stream) -> CutBlock:
        """Refit a block's second layer, and advance the cut stream through it."""
        stream.advance(block.neurons)
        weight, bias = (self._tensor(argument(block.down, place)) for place in (1, 2))
        scale = torch.ones_like(bias) if block.scale is None else self._tensor(block.scale)
        wide, offset, factor = weight.double(), bias.double(), scale.double()
        goal = dense.exit.name

        def wanted(values: Values, goals: Values) -> tuple[Tensor, Tensor]:
            """Return what the second layer should yield, [B,N,D], and what it reads, [B,N,M], in float64."""
            rest = (goals[goal].double() - values[block.attended.name].double()) / factor
            rest = torch.where(factor == 0, 0.0, rest)  # what is multiplied by nothing may be anything
            return rest, values[block.neurons.name].double()

        system: RidgeRegression | None = None
        for (batch, values), (_, goals) in zip(stream, target, strict=True):
            rest, neurons = wanted(values, goals)
            if system is None:
                rows = len(self._split.fitted) * neurons.shape[1]
                system = RidgeRegression(weight.shape[1], weight.shape[0], rows, weight.device)
            if frames := self._rows(batch, self._split.fitted):
                x, y = (v[frames].flatten(0, 1) for v in (neurons, rest - functional.linear(neurons, wide, offset)))
                system.add(x, y, torch.ones(len(x), dtype=torch.float64, device=x.device))
        if system is None:
            raise CalibrationError("no calibration frames: give some")
        trials = {0.0: (weight, bias)}
        for rho in RHOS:
            found = system.solve(rho)
            trials[rho] = found.added_to(weight), (offset + found.bias).to(bias.dtype)
        apart, whole = dict.fromkeys(trials, 0.0), 0.0
        for (batch, values), (_, goals) in zip(stream, target, strict=True):
            if frames := self._rows(batch, self._split.held_out):
                rest, neurons = (value[frames] for value in wanted(values, goals))
                whole += goals[goal][frames].double().square().sum().item()
                for rho, (matrix, added) in trials.items():
                    left = factor * (rest - functional.linear(neurons, matrix.double(), added.double()))
                    apart[rho] += left.square().sum().item()
        best = min(trials, key=lambda rho: apart[rho])  # the first among equals: the weights as they were
        matrix, added = trials[best]
        if best:
            self._run.shelf.write(f"vision-{block.path}", {"weight": matrix, "bias": added})

        def leaving(on: Values) -> Values:
            yielded = functional.linear(on[block.neurons.name], matrix, added)
            scaled = yielded if block.scale is None else yielded * scale
            return {block.exit.name: on[block.attended.name] + scaled}

        stream.jump(block.exit, leaving)
        moved = tuple((apart[rho] / whole) ** 0.5 if whole else 0.0 for rho in (0.0, best))
        return CutBlock(path=block.path, neurons=self._kept[block.path], rho=best, moved=(moved[0], moved[1]))

    def _tensor(self, node: object) -> Tensor:
        return materialized(get_tensor(self._gm, str(getattr(node, "target", node))))

    @staticmethod
    def _rows(batch: Batch, frames: frozenset[int]) -> list[int]:
        return [row for row, place in enumerate(batch.places) if place in frames]
