"""What a calibration will take: memory for activations, and time, from one layer that has run."""

from collections.abc import Sequence
from dataclasses import dataclass
from time import perf_counter

import torch

from evla_compile.calibration.dense_measures import DenseRun
from evla_compile.calibration.streams import Batch, Stream
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.walk import Values
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.sizes import ModelSizes
from evla_compile.units import bytes_text

_DENSE_STREAMS = 3  # in front of the decoder, behind the last layer, and behind the one that runs
_WIDTHS = 4  # of what a trial holds at its widest: entry, context, sum and the neurons that stay
_FLOAT64 = 2  # times as long as an operation of the policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Forecast:
    """About how long the decoder's part of a calibration takes, and what it holds."""

    frames: int
    """Frames."""
    seconds: float
    """Time of the dense decoder, of every trial of a repair, and of the regressions."""
    size: int
    """Bytes of activations between two layers."""

    def __str__(self) -> str:
        time = f"{self.seconds / 60:.0f} minutes" if self.seconds > 90 else f"{self.seconds:.0f} seconds"
        return f"about {time} and {bytes_text(self.size)} of activations for {self.frames} frames"


def most_trials(config: CompileConfig, sizes: ModelSizes) -> int:
    """Return how many repairs calibration tries at most, none where it repairs nothing."""
    if "repair" not in config.measurements(sizes):
        return 0
    return len(config.repair_scopes) * len(config.repair_strengths)


def stream_bytes(policy: CogACT, batches: Sequence[Batch], trials: int) -> int:
    """Return about how many bytes of activations a calibration holds between two layers.

    Args:
        policy: the policy.
        batches: all frames.
        trials: repairs that are tried side by side.
    """
    sizes, parameter = policy.sizes, next(policy.parameters())
    rows = sum(len(batch.places) * (sizes.patches + batch.input_ids.shape[1]) for batch in batches)
    streams = _DENSE_STREAMS + _WIDTHS * (trials + 1 if trials else 0)
    return streams * rows * sizes.language.width * parameter.element_size()


def forecast(policy: CogACT, run: DenseRun, start: Stream, config: CompileConfig, frames: int) -> Forecast:
    """Run the first decoder layer on one batch, and return what the whole decoder will take.

    Args:
        policy: the policy.
        run: its dense run.
        start: its stream in front of the decoder.
        config: the settings, resolved.
        frames: for how many frames to reckon.
    """
    batch, values = next(iter(start))
    loading, running = _first_layer(run, batch, values)
    if batch.image.is_cuda:  # the first time, libraries are loaded and kernels chosen
        loading, running = _first_layer(run, batch, values)
    language, text = policy.sizes.language, batch.input_ids.shape[1]
    whole = _layer_flops(language.width, language.mlp_width, policy.sizes.patches + text)
    rate = running / (whole * len(batch.places))  # seconds a floating-point operation
    kept, visual = config.kept_layer_count(policy.sizes), config.kept_tokens(policy.sizes.patches)[0]
    neurons, tokens = config.kept_neurons(language.mlp_width), visual + text
    trial = 2 * frames * _layer_flops(language.width, neurons, tokens)  # without and with new weights
    for features in (neurons, neurons + language.width):
        rows = frames * tokens
        side, other = min(rows, features), max(rows, features)
        trial += _FLOAT64 * 2 * (side**2 * other + side**3 // 3 + side * features * language.width)
    trials = most_trials(config, policy.sizes)
    work = language.layers * whole * frames + (trials + 1 if trials else 0) * kept * trial
    size = stream_bytes(policy, start.batches, trials) * frames // sum(len(each.places) for each in start.batches)
    return Forecast(frames=frames, seconds=work * rate + 2 * language.layers * loading, size=size)


def _first_layer(run: DenseRun, batch: Batch, values: Values) -> tuple[float, float]:
    """Run the first decoder layer on a batch; return the seconds that its weights took, and those of the layer."""
    loading = running = 0.0
    with torch.no_grad():
        for stretch in range(run.walk.count_to(run.front), run.walk.count_to(run.layers[0].exit)):
            began = perf_counter()
            with run.walk.loaded(stretch):
                loaded = perf_counter()
                values = run.walk.run_stretch(stretch, values, len(batch.places))
                if batch.image.is_cuda:
                    torch.cuda.synchronize()
                running += perf_counter() - loaded
            loading += loaded - began
    return loading, running


def _layer_flops(width: int, neurons: int, tokens: int) -> int:
    """Return the floating-point operations of a decoder layer's projections on one frame."""
    return 2 * tokens * (4 * width**2 + 3 * width * neurons)
