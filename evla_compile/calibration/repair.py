"""Repair: refit the projections of kept decoder layers in closed form, layer by layer, against the dense policy.

For a kept layer whose successor is layer n, or the final norm, the target T is the dense policy's residual stream in
front of n, at the positions that are kept there, merged as the compressed policy merges. With x what enters the layer
in the compressed policy, C its attention context, O its output projection, a = x + C O^T, m the activations of the
neurons that stay, and W the down projection:

1. a joint ridge regression of T - a - m W^T on [C, m], of which the part of O alone is kept: O += dO; then a and m are
   computed anew;
2. a ridge regression of T - a - m W^T on m gives dW and the bias b: W += dW, and b is added behind.

The penalty is on the change, so a large rho means the weights as they were. Several trials, of different scope and rho,
advance together, so that every weight is read once for all of them; those that agree so far share a stream.

Shape legend: B batch, S positions, P patches, K visual tokens kept, D decoder width, H width of the context, M neurons.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.nn import functional

from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.kept_layer import KeptLayer, RowWeights
from evla_compile.calibration.resumption import Resumption
from evla_compile.calibration.ridge import RidgeRegression, linear
from evla_compile.calibration.streams import Batch, Stream, in_frame_order
from evla_compile.graph.sites import decoder_layers, stage_node
from evla_compile.graph.walk import GraphWalk, Values
from evla_compile.settings.anatomy import COGNITION
from evla_compile.settings.budgets.repair import RepairScope


@dataclass(frozen=True, kw_only=True, slots=True)
class Trial:
    """One way to repair."""

    scope: RepairScope
    """Which layers are refit."""
    rho: float
    """Strength of the penalty; 0.0 where nothing is refit."""

    def __str__(self) -> str:
        return self.scope if self.scope == "none" else f"{self.scope}-{self.rho:g}"


class Repair:
    """Advances trials of a compressed graph beside the dense policy, and refits the layers of each."""

    def __init__(
        self,
        gm: fx.GraphModule,
        dense: DenseRun,
        fitted: frozenset[int],
        weights: RowWeights,
        resumption: Resumption,
    ) -> None:
        """Prepare the walk.

        Args:
            gm: the compressed graph: layers, neurons and tokens chosen, nothing narrowed yet.
            dense: the dense policy.
            fitted: places of the frames that are fitted on.
            weights: weights of positions.
            resumption: records every finished layer.
        """
        graph = gm.graph
        self.layers = [KeptLayer(gm, layer) for layer in decoder_layers(graph)]
        self.readout = stage_node(graph, COGNITION)
        self._dense, self._batches, self._shelf = dense, dense.batches, dense.shelf
        self._fitted, self._weights, self._resumption = fitted, weights, resumption
        stages = {node.meta["stage"]: node for node in graph.nodes if "stage" in node.meta}
        self._kept, self._merged = stages.get("kept_patches"), stages.get("merge_weights")
        held = {node: self.readout for node in (self._kept, self._merged) if node is not None}
        self._front = dense.front_in(graph)
        stops = [self._front]
        for place, each in enumerate(self.layers):
            stops += each.stops
            if (following := self._following(place)) is not each.layer.exit:
                stops.append(following)
        self.walk = GraphWalk(gm, stops, held=held)

    def run(
        self,
        trials: Sequence[Trial],
        start: Stream,
        tick: Callable[[], None] = lambda: None,
        compressed: Stream | None = None,
    ) -> dict[Trial, Tensor]:
        """Advance all trials to the cognition feature, from where an earlier run was interrupted.

        Args:
            trials: which; each once.
            start: the dense stream in front of the decoder.
            tick: called behind every layer.
            compressed: the compressed stream there, which stays as it is; None where nothing in front of the decoder is
                compressed.

        Returns:
            The cognition feature of every frame for each trial, float32 [F,D].
        """
        resumed = self._resumed(trials)
        if resumed is None:
            first = (compressed or start).onto(self.walk, self._front, "compressed")
            resumed = 0, start.fork("target"), [(first, list(trials))]
        done, target, streams = resumed
        for place in range(len(self.layers)):
            if place >= done:
                target.advance(self._target_node(place))
                streams = [new for stream, sharing in streams for new in self._advance(place, stream, sharing, target)]
                self._record(place + 1, target, streams)
            tick()
        features: dict[Trial, Tensor] = {}
        for stream, sharing in streams:
            found = in_frame_order(stream.batches, [values[self.readout.name] for _, values in stream])
            features |= dict.fromkeys(sharing, found)
        for stream in (target, *(stream for stream, _ in streams)):
            stream.close()
        return features

    def _record(self, done: int, target: Stream, streams: Sequence[tuple[Stream, Sequence[Trial]]]) -> None:
        """Record that so many layers are finished."""
        entries = {*target.entries, *(entry for stream, _ in streams for entry in stream.entries)}
        entries |= {
            f"weights-{trial}-{each.layer.index}"
            for _, sharing in streams
            for trial in sharing
            for place, each in enumerate(self.layers[:done])
            if self.refits(trial, place)
        }
        listed = [[stream.name, stream.done, list(map(str, sharing))] for stream, sharing in streams]
        self._resumption.record("repair", {"layers": done, "target": target.done, "streams": listed}, entries)

    def _resumed(self, trials: Sequence[Trial]) -> tuple[int, Stream, list[tuple[Stream, list[Trial]]]] | None:
        """Return the finished layers, the dense stream and those of the trials that an earlier run has left, if any."""
        reached, named = self._resumption.reached("repair"), {str(trial): trial for trial in trials}
        if reached is None:
            return None
        target = Stream(self._dense.walk, self._batches, self._shelf, "target", reached["target"])
        streams = [
            (Stream(self.walk, self._batches, self._shelf, name, done), [named[trial] for trial in sharing])
            for name, done, sharing in reached["streams"]
        ]
        return reached["layers"], target, streams

    def tensors(self, trial: Trial) -> dict[str, Tensor]:
        """Return the refit weights of a trial that ran, by module path."""
        device = self._batches[0].image.device
        found: dict[str, Tensor] = {}
        for place, each in enumerate(self.layers):
            if self.refits(trial, place):
                values = self._shelf.read(f"weights-{trial}-{each.layer.index}", device)
                found |= {f"{each.layer.path}.{name}": tensor for name, tensor in values.items()}
        return found

    def forget(self, trial: Trial) -> None:
        """Drop the refit weights of a trial that ran, unless an interrupted run would go on from them."""
        for place, each in enumerate(self.layers):
            if self.refits(trial, place):
                self._shelf.drop(f"weights-{trial}-{each.layer.index}")

    def refits(self, trial: Trial, place: int) -> bool:
        """Tell whether a trial refits the kept layer at a place."""
        if trial.scope == "gaps":
            return self._next_index(place) != self.layers[place].layer.index + 1
        return trial.scope == "all" or (trial.scope == "last" and place == len(self.layers) - 1)

    def _next_index(self, place: int) -> int:
        """Return the index, in the checkpoint, of the kept layer behind a place; that of the final norm is the last."""
        following = self.layers[place + 1 :]
        return following[0].layer.index if following else len(self._dense.layers)

    def _following(self, place: int) -> fx.Node:
        """Return the node that enters the next kept layer: behind a selection it is not what left this one."""
        return self.layers[place + 1].layer.entry if place + 1 < len(self.layers) else self.readout

    def _target_node(self, place: int) -> fx.Node:
        return self._dense.layers[self._next_index(place) - 1].exit

    def _advance(
        self, place: int, stream: Stream, trials: list[Trial], dense: Stream
    ) -> list[tuple[Stream, list[Trial]]]:
        """Advance one stream through a kept layer, and return the streams that its trials go on in."""
        each = self.layers[place]
        stream.advance(each.context)
        refit = [trial for trial in trials if self.refits(trial, place)]
        rest = [trial for trial in trials if trial not in refit]
        found: list[tuple[Stream, list[Trial]]] = []
        if refit:
            unrepaired = stream.fork(f"joint-{place}")
            unrepaired.advance(each.neurons)
            output, down = (each.weight(projection) for projection in (each.output, each.down))
            joint = self._system((down.shape[0], output.shape[1] + down.shape[1]), each.context, stream)
            contexts = (values[each.context.name] for _, values in stream)
            for (batch, values), (_, target), context in zip(unrepaired, dense, contexts, strict=True):
                if self._frames(batch):
                    residual, neurons = self._residual(place, batch, values, target, down)
                    features = torch.cat([self._rows(batch, context), neurons], dim=1)
                    joint.add(features, residual, self._row_weights(batch, context))
            unrepaired.close()
            for trial in refit:
                refitted = joint.solve(trial.rho, blocks=(output.shape[1], down.shape[1])).added_to(output)
                found.append((self._refit(place, stream, trial, dense, refitted, down), [trial]))
        if rest:
            stream.advance(self._following(place))
            found.append((stream, rest))
        else:
            stream.close()
        return found

    def _refit(self, place: int, stream: Stream, trial: Trial, dense: Stream, output: Tensor, down: Tensor) -> Stream:
        """Return a stream behind a kept layer with a refit output projection, whose down projection is refit here."""
        each = self.layers[place]
        entry, context, attended, neurons, leaving = (
            node.name for node in (each.layer.entry, each.context, each.attended, each.neurons, each.layer.exit)
        )

        refit = stream.fork(f"{trial}-{place}")
        refit.jump(each.attended, lambda on: {attended: on[entry] + functional.linear(on[context], output)})
        refit.advance(each.neurons)
        system = self._system((down.shape[0], down.shape[1]), each.neurons, refit)
        for (batch, values), (_, target) in zip(refit, dense, strict=True):
            if self._frames(batch):
                residual, activations = self._residual(place, batch, values, target, down)
                system.add(activations, residual, self._row_weights(batch, values[neurons]))
        found = system.solve(trial.rho)
        weight, offset = found.added_to(down), found.bias.to(down.dtype)
        names = ("self_attn.o_proj.weight", "mlp.down_proj.weight", "mlp.down_proj.bias")
        tensors = dict(zip(names, (output, weight, offset), strict=True))
        self._shelf.write(f"weights-{trial}-{each.layer.index}", tensors)
        refit.jump(each.layer.exit, lambda on: {leaving: on[attended] + functional.linear(on[neurons], weight, offset)})
        refit.advance(self._following(place))
        return refit

    def _system(self, shape: tuple[int, int], read: fx.Node, stream: Stream) -> RidgeRegression:
        """Return a regression for a matrix of a shape, with as many rows as the positions of `read` give."""
        batch, values = next(iter(stream))
        visual = values[read.name].shape[1] - batch.input_ids.shape[1]  # those of all batches: reading one tells
        rows = sum(
            len(self._frames(each)) * len(self._positions(each, visual + each.input_ids.shape[1])[0])
            for each in self._batches
        )
        outputs, features = shape
        return RidgeRegression(features, outputs, rows, self._batches[0].image.device)

    def _residual(self, place: int, batch: Batch, values: Values, dense: Values, down: Tensor) -> tuple[Tensor, Tensor]:
        """Return T - a - m W^T [N,D], W being `down`, and m [N,M], in the rows that count."""
        each = self.layers[place]
        target = self._selected(batch, values, dense[self._target_node(place).name])
        neurons = self._rows(batch, values[each.neurons.name])
        residual = self._rows(batch, target) - self._rows(batch, values[each.attended.name]) - linear(neurons, down)
        return residual, neurons

    def _selected(self, batch: Batch, values: Values, target: Tensor) -> Tensor:
        """Return the dense states [B,S,D] at the positions that the compressed policy has, merged as it merges."""
        if self._kept is None or self._kept.name not in values:
            return target
        behind = target.shape[1] - batch.input_ids.shape[1] + 1  # BOS and the patches
        patches = target[:, 1:behind]  # [B,P,D]
        if self._merged is not None:
            kept = values[self._merged.name].to(target.dtype) @ patches  # [B,K,D]
        else:
            kept = patches.gather(1, values[self._kept.name][:, :, None].expand(-1, -1, target.shape[2]))
        return torch.cat([target[:, :1], kept, target[:, behind:]], dim=1)

    def _frames(self, batch: Batch) -> list[int]:
        """Return the rows of a batch whose frames are fitted on."""
        return [row for row, place in enumerate(batch.places) if place in self._fitted]

    def _positions(self, batch: Batch, positions: int) -> tuple[Tensor, Tensor]:
        """Return the positions that have a weight in the regressions, int64 [U], and their weights, float64 [U]."""
        weights = self._weights.of(positions, batch.input_ids.shape[1])
        return weights.nonzero().flatten(), weights[weights > 0]

    def _rows(self, batch: Batch, values: Tensor) -> Tensor:
        """Return the rows [N,K] of values [B,S,K] that are fitted on and have a weight, float64."""
        positions, _ = self._positions(batch, values.shape[1])
        return values[self._frames(batch)][:, positions.to(values.device)].flatten(0, 1).double()

    def _row_weights(self, batch: Batch, values: Tensor) -> Tensor:
        """Return the weights [N] of these rows."""
        _, weights = self._positions(batch, values.shape[1])
        return weights.repeat(len(self._frames(batch))).to(values.device)
