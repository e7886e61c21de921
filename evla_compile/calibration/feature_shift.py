"""How far the cognition feature moves without a decoder layer: the measure of the greedy layer rule."""

from collections.abc import Callable, Sequence

from torch import Tensor

from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.streams import Stream, in_frame_order


class FeatureShift:
    """Measures the shift of the cognition feature for ever fewer decoder layers.

    What lies in front of the layer that is left out is computed once: the vision towers for good, and the states
    behind every layer of the present choice until that changes.
    """

    def __init__(self, run: DenseRun, start: Stream, features: Tensor, tick: Callable[[], None]) -> None:
        """Prepare.

        Args:
            run: the dense policy.
            start: its stream in front of the decoder.
            features: its cognition features, float32 [F,D].
            tick: called behind every measurement.
        """
        self._run, self._start, self._features, self._tick = run, start, features, tick
        self._layers: tuple[int, ...] = ()
        self._states: list[list[Tensor]] = []

    def __call__(self, layers: tuple[int, ...], without: int) -> float:
        """Return the mean over frames of |f - f_dense| / |f_dense| with `layers` but for one of them."""
        if layers != self._layers:
            self._follow(layers)
        place = layers.index(without)
        states = self._states[place]
        for layer in layers[place + 1 :]:
            states = self._through(layer, states)
        moved = (self._feature(states) - self._features).norm(dim=-1) / self._features.norm(dim=-1)  # [F]
        self._tick()
        return float(moved.mean())

    def _follow(self, layers: tuple[int, ...]) -> None:
        """Compute the states in front of each of `layers`, from the first one on that differs from before."""
        same = 0
        while same < min(len(layers), len(self._layers)) and layers[same] == self._layers[same]:
            same += 1
        entry = self._run.layers[0].entry.name
        first = [values[entry] for _, values in self._start]
        self._states = self._states[: same + 1] or [first]
        for layer in layers[same:-1]:
            self._states.append(self._through(layer, self._states[-1]))
        self._layers = layers

    def _through(self, layer: int, states: Sequence[Tensor]) -> list[Tensor]:
        """Return the states [B,S,D] of every batch behind a layer."""
        found = self._run.layers[layer]
        return self._run.between(self._start, found.entry, found.exit, states)

    def _feature(self, states: Sequence[Tensor]) -> Tensor:
        """Return the cognition feature of every frame, float32 [F,D]."""
        found = self._run.between(self._start, self._run.layers[-1].exit, self._run.readout, states)
        return in_frame_order(self._start.batches, found)
