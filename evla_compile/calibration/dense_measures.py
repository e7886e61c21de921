"""What a run of the dense policy over all calibration frames measures: layers, neurons, activation ranges."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from evla_compile.calibration.activation_ranges import ActivationRanges
from evla_compile.calibration.layer_importance import mean_cosine
from evla_compile.calibration.streams import Batch, Shelf, Stream, in_frame_order
from evla_compile.graph.deferred import materialized
from evla_compile.graph.sites import DecoderLayer, argument, decoder_layers, stage_node, vision_blocks
from evla_compile.graph.walk import GraphWalk, Watch
from evla_compile.settings.anatomy import COGNITION


class DenseRun:
    """The dense policy up to the cognition feature, layer by layer over all frames.

    Attributes:
        layers: its decoder layers.
        front: the last node in front of them.
        readout: the node whose value is the cognition feature.
        walk: its graph, divided in front of the decoder, behind every layer, and at the feature.
        graph: its graph as it was captured.
        batches: all frames.
        shelf: where streams are kept.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Batch], shelf: Shelf) -> None:
        self.layers, self.readout = decoder_layers(graph.graph), stage_node(graph.graph, COGNITION)
        self.front = front_of(self.layers[0])
        exits = [layer.exit for layer in self.layers]
        entries = {layer.entry: layer.exit for layer in self.layers}  # kept for the cosine with what leaves the layer
        self.walk = GraphWalk(graph, [self.front, *exits, self.readout], held=entries)
        self.graph, self.batches, self.shelf = graph, batches, shelf

    def front_in(self, graph: fx.Graph) -> fx.Node:
        """Return the node of a rewritten graph that computes what `front` does in this one."""
        found: fx.Node = next(node for node in graph.nodes if node.name == self.front.name)
        return found

    def start(self, name: str) -> Stream:
        """Return a stream in front of the vision towers."""
        return Stream.start(self.walk, self.batches, self.shelf, name)

    def features(self, stream: Stream) -> Tensor:
        """Return the cognition feature of every frame, float32 [F,D], of a stream that has reached it."""
        return in_frame_order(stream.batches, [values[self.readout.name] for _, values in stream])

    def between(self, start: Stream, first: fx.Node, last: fx.Node, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the value of `last` on every batch, with `states` as that of `first`; both are stops of the walk.

        Args:
            start: the stream in front of the decoder, for the values that no layer changes.
            first: what enters a layer.
            last: what leaves it.
            states: hidden states [B,S,D] of every batch.
        """
        walk = self.walk
        here = self.front if first is self.layers[0].entry else first
        live = {node.name for node in walk.live(here)}
        given = [{n: v for n, v in {**b.inputs, **values}.items() if n in live} for b, values in start]
        found = [values | {first.name: state} for values, state in zip(given, states, strict=True)]
        with torch.no_grad():
            for stretch in range(walk.count_to(here), walk.count_to(last)):
                with walk.loaded(stretch):
                    found = [
                        walk.run_stretch(stretch, values, len(batch.places))
                        for batch, values in zip(start.batches, found, strict=True)
                    ]
        return [values[last.name] for values in found]


class DenseMeasures:
    """Measurements of a dense run, made as its stream advances."""

    def __init__(self, run: DenseRun, frames: int, *, neurons: bool, vision: bool = False) -> None:
        self._run, self._frames = run, frames
        self._cosines = torch.zeros(len(run.layers), frames, dtype=torch.float64)
        gates = {argument(layer.named("mlp.down_proj"), 0): place for place, layer in enumerate(run.layers)}
        self._gates = gates if neurons else {}
        self._activity: list[Tensor | float] = [0.0 for _ in run.layers]
        self._tokens = 0
        self._blocks = vision_blocks(run.graph.graph) if vision else ()
        # of each block, over tokens: their number, the sum of each neuron's activation, and that of its square
        self._moments = [torch.zeros(3, dtype=torch.float64)[:, None] for _ in self._blocks]
        self._ranges = ActivationRanges(run.walk.graph)

    def watch(self, batch: Batch) -> Watch:
        """Return what measures a batch while a stream advances."""
        found: dict[fx.Node, list[Callable[[Tensor], None]]] = {}
        for node, see in self._ranges.watch().items():
            found.setdefault(node, []).append(see)
        for place, layer in enumerate(self._run.layers):
            found.setdefault(layer.exit, []).append(partial(self._see_layer, place, batch))
        for node, place in self._gates.items():
            found.setdefault(node, []).append(partial(self._see_neurons, place))
        for place, block in enumerate(self._blocks):
            found.setdefault(block.neurons, []).append(partial(self._see_vision, place))
        return {node: partial(_call_all, seen) for node, seen in found.items()}

    def importance(self) -> tuple[float, ...]:
        """Return 1 - the mean cosine of every layer's input and output, in their order."""
        return tuple(1.0 - sum(values) / self._frames for values in self._cosines.tolist())

    def neuron_scores(self) -> tuple[NDArray[np.float32], ...]:
        """Return the score of every neuron of every layer, float32 [M]; nothing where they were not measured."""
        if not self._gates:
            return ()
        scores = []
        for activity, layer in zip(self._activity, self._run.layers, strict=True):
            down = self._run.walk.fetch_attr(str(argument(layer.named("mlp.down_proj"), 1).target))
            scores.append((torch.as_tensor(activity) / self._tokens * down.float().norm(dim=0).cpu()).numpy())
        return tuple(scores)

    def vision_scores(self) -> dict[str, NDArray[np.float32]]:
        """Return the score of every neuron of every vision block, float32 [M], by its module path.

        It is the standard deviation of the activation over all tokens, times the norm of the neuron's column of the
        second layer. Nothing where it was not measured.
        """
        found = {}
        for block, (tokens, total, squares) in zip(self._blocks, self._moments, strict=True):
            spread = (squares / tokens - (total / tokens).square()).clamp_min(0.0).sqrt()
            down = materialized(self._run.walk.fetch_attr(str(argument(block.down, 1).target)))
            found[block.path] = (spread * down.double().norm(dim=0).cpu()).float().numpy()
        return found

    def ranges(self) -> dict[str, float]:
        """Return the largest absolute input or output of every layer that could be lowered, by its module path."""
        return self._ranges.found()

    def state(self) -> dict[str, Any]:
        """Return what was measured so far: tensors and whole numbers, by name."""
        seen = self._ranges.state()
        activity = {f"activity.{place}": torch.as_tensor(value) for place, value in enumerate(self._activity)}
        ranges = torch.tensor([seen[name] for name in sorted(seen)], dtype=torch.float64)
        moments = {f"moments.{place}": value for place, value in enumerate(self._moments)}
        return {"cosines": self._cosines, "ranges": ranges, "tokens": self._tokens, **activity, **moments}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what an earlier run had measured with the same policy and frames."""
        names = sorted(self._ranges.state())
        self._ranges.restore(dict(zip(names, state["ranges"].tolist(), strict=True)))
        self._cosines, self._tokens = state["cosines"].clone(), state["tokens"]
        self._activity = [state[f"activity.{place}"].clone() for place in range(len(self._activity))]
        self._moments = [state[f"moments.{place}"].clone() for place in range(len(self._moments))]

    def _see_layer(self, place: int, batch: Batch, value: Tensor) -> None:
        before = self._run.walk.env[self._run.layers[place].entry]
        self._cosines[place, list(batch.places)] = mean_cosine(before, value).double().cpu()

    def _see_neurons(self, place: int, value: Tensor) -> None:
        self._activity[place] += value.float().abs().sum(dim=(0, 1)).cpu()  # [M] of [B,S,M]
        if place == 0:
            self._tokens += value.shape[0] * value.shape[1]

    def _see_vision(self, place: int, value: Tensor) -> None:
        rows = value.flatten(0, 1).double()  # [B*N,M]
        seen = torch.stack([torch.full_like(rows[0], len(rows)), rows.sum(dim=0), rows.square().sum(dim=0)])
        self._moments[place] = self._moments[place] + seen.cpu()


def front_of(layer: DecoderLayer) -> fx.Node:
    """Return the last operator in front of the first decoder layer: with it, the rotary tables are known too."""
    node = layer.nodes[0].prev
    while node.op != "call_function":
        node = node.prev
    return node


def _call_all(seen: Sequence[Callable[[Tensor], None]], value: Tensor) -> None:
    for see in seen:
        see(value)
