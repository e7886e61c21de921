"""Calibrate: measure on real observations what a policy can spare, repair what is left, and make the plan.

Everything is measured without padding and without training. The policy runs layer by layer over all frames, so that
every weight is read once for all of them.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from functools import partial

from torch import Tensor, fx

from evla_compile import __version__
from evla_compile.calibration.action_shift import ActionShift
from evla_compile.calibration.cache_search import CachedRun
from evla_compile.calibration.dense_measures import DenseMeasures, DenseRun
from evla_compile.calibration.feature_shift import FeatureShift
from evla_compile.calibration.fingerprint import FramesDigest, fingerprint_weights
from evla_compile.calibration.forecast import forecast, most_trials, stream_bytes
from evla_compile.calibration.held_out import split_frames
from evla_compile.calibration.progress import CalibrationProgress, drawing_progress
from evla_compile.calibration.repair_trials import RepairTrials
from evla_compile.calibration.resumption import Resumption
from evla_compile.calibration.solver_search import SolverRun
from evla_compile.calibration.streams import Batch, Stream, batches_of, open_shelf
from evla_compile.calibration.vision_cut import VisionCut
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.finite_weights import check_finite_policy
from evla_compile.graph.plan_tensors import to_plan_tensor
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame, as_frames
from evla_compile.json_text import to_json_text
from evla_compile.settings.budgets.budget import Measured
from evla_compile.settings.budgets.layers import drop_trials
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, planned

_GREEDY_FRAMES = 50  # that choose the layers, about


@own_torch_state()
def calibrate(
    policy: CogACT,
    frames: Iterable[Frame],
    config: CompileConfig | None = None,
    *,
    progress: bool = True,
    scratch: str | os.PathLike[str] | None = None,
) -> Plan:
    """Measure `policy` on `frames` and return the plan for the budgets of `config`.

    Layer importance is EfficientVLA's equation 1: I(l) = 1 - mean over frames of the mean over positions of
    cos(layer input, layer output), residual included, the last layer before the final norm; the lowest go, the lower
    index among equals. With `layer_rule="greedy"`, which is not in the paper, layers go one after the other, each time
    the one without which the cognition feature f changes least, by the mean over frames of |f - f_dense| / |f_dense|.
    To drop d of L layers, the decoder runs up to d (L - d/2) times for every frame, so that about 50 of the frames,
    spread evenly, decide.

    A number of denoising steps that compute (`cache_steps`), or of a solver's timesteps (`solver_steps`), is decided by
    trying all sets of that many, on the dense policy's cognition features: that is taken with which the actions are
    nearest to those of all steps of DDIM, from equal noise.

    The score of a decoder's neuron is the mean over all tokens of |silu(gate) up| times the norm of its column of the
    down projection. Calibration also records the largest value in every layer that could be computed in half precision.

    With `vision_mlp_keep`, the MLPs of the vision towers are cut and refit, see `evla_compile.calibration.vision_cut`.

    With `repair`, the projections of the layers that stay are refit to the dense policy, see
    `evla_compile.calibration.repair`, on most of the episodes; the others decide which repair is taken, if any.

    Args:
        policy: the dense policy.
        frames: real observations of the robot's task, at least one, as (image, instruction) pairs; a repair needs about
            40 of each instruction, and takes the episode of each, `Frame.episode`, into account.
        config: the budgets; None for the defaults of `CompileConfig`.
        progress: whether to draw a progress bar on standard error.
        scratch: folder for the activations between two layers, for this calibration alone. If it is interrupted, the
            same call goes on behind the last finished layer. None for memory, or a temporary folder where they are
            large.

    Raises:
        CalibrationError: there are no frames, too few for a repair or a cut of the towers, or the policy's values are
            not finite.
        CheckpointError: a weight has values that are not finite.
        ValueError: a frame or an instruction is refused by the processor, or a budget does not fit the policy.
    """
    config = (config or CompileConfig()).resolve(policy.sizes)
    plan, _, _ = measure(policy, frames, config, progress=progress, scratch=scratch)
    return plan


@own_torch_state()
def measure(
    policy: CogACT,
    frames: Iterable[Frame],
    config: CompileConfig,
    *,
    progress: bool,
    scratch: str | os.PathLike[str] | None = None,
) -> tuple[Plan, fx.GraphModule, Tensor]:
    """Return the plan of `calibrate`, the captured policy that it was measured on, and its cognition features [F,D]."""
    sizes = policy.sizes
    config.decide(sizes, None)  # refuses budgets that do not fit, before anything is measured
    asked = config.measurements(sizes)
    observations = as_frames(frames)
    if not observations:
        raise CalibrationError("no calibration frames: give at least one real (image, instruction) observation")
    split = split_frames(observations, config.repair_frames) if asked & {"repair", "vision"} else None
    check_finite_policy(policy)
    graph = capture(policy, config)
    batches, checkpoint = batches_of(policy, observations), fingerprint_weights(policy.state_dict())
    digest = _digest(batches)
    needed = stream_bytes(policy, batches, most_trials(config, sizes))
    with open_shelf(scratch, needed) as shelf, drawing_progress(wanted=progress) as bar:
        resumption = Resumption(shelf, _key(config, digest, checkpoint))
        run = DenseRun(graph, batches, shelf)
        found = DenseMeasures(run, len(observations), neurons="neuron_scores" in asked, vision="vision" in asked)
        start, features = _run_dense(policy, run, found, resumption, bar, config)
        shift = vision = trials = solver_shift = cache_shift = None
        if "feature_shift" in asked:
            count = drop_trials(sizes.language.layers, config.kept_layer_count(sizes))
            some = start.thinned("some", _GREEDY_FRAMES)
            places = sorted(place for batch in some.batches for place in batch.places)
            shift = FeatureShift(run, some, features[places], bar.step("Dropping layers", count))
        if split is not None and "vision" in asked:
            vision = VisionCut(run, found.vision_scores(), split, resumption, bar)
        if split is not None and "repair" in asked:
            trials = RepairTrials(policy, run, start, features, split, config, resumption, bar, vision)
        if "solver_shift" in asked:
            begin = partial(bar.step, "Choosing timesteps", len(config.timestep_sets()))
            solver_shift = ActionShift(policy, features, config, partial(SolverRun, policy, config), begin)
        if "cache_shift" in asked:
            begin = partial(bar.step, "Choosing denoising steps", config.cache_candidates)
            cache_shift = ActionShift(policy, features, config, partial(CachedRun, policy, config), begin)
        measured = Measured(
            layer_importance=found.importance(),
            neuron_scores=found.neuron_scores(),
            feature_shift=shift,
            vision=vision,
            repair=trials,
            solver_shift=solver_shift,
            cache_shift=cache_shift,
        )
        decisions = config.decide(sizes, measured)
        refitted = [each for each in (vision, trials) if each is not None]
        refit = {name: to_plan_tensor(tensor) for each in refitted for name, tensor in each.tensors.items()}
        resumption.finish()
    ranges = found.ranges()
    for each in refitted:
        for path, largest in each.ranges.items():
            ranges[path] = max(ranges.get(path, 0.0), largest)
    plan = Plan(
        decisions=planned(decisions),
        ranges=tuple(ranges.items()),
        frames=len(observations),
        frames_digest=digest,
        checkpoint=checkpoint,
        tensors=refit,
    )
    return plan, graph, features


def _run_dense(
    policy: CogACT,
    run: DenseRun,
    found: DenseMeasures,
    resumption: Resumption,
    bar: CalibrationProgress,
    config: CompileConfig,
) -> tuple[Stream, Tensor]:
    """Run the dense policy, and return its stream in front of the decoder and its cognition features [F,D]."""
    start = resumption.stream(run.walk, run.batches, "front") or run.start("front")
    _measure_up_to(run.front, start, found, resumption, bar, "Calibrating: vision")
    bar.say(f"calibrating the decoder: {forecast(policy, run, start, config, sum(len(b.places) for b in run.batches))}")
    dense = resumption.stream(run.walk, run.batches, "dense") or start.fork("dense")
    _measure_up_to(run.readout, dense, found, resumption, bar, "Calibrating: decoder")
    features = run.features(dense)
    dense.close()
    return start, features


def _measure_up_to(
    stop: fx.Node,
    stream: Stream,
    found: DenseMeasures,
    resumption: Resumption,
    bar: CalibrationProgress,
    text: str,
) -> None:
    """Advance a stream of the dense policy to a node, measuring, from where an earlier run has left it."""
    if (earlier := resumption.measures(stream.name)) is not None:
        found.restore(earlier)
    advanced = bar.step(text, stream.walk.count_to(stop) - stream.done)

    def tick() -> None:
        resumption.record_stream(stream, found.state)
        advanced()

    stream.advance(stop, found.watch, tick)


def _key(config: CompileConfig, frames: str, checkpoint: Sequence[tuple[str, str]]) -> str:
    """Return a digest of all that decides what a calibration calculates."""
    described = {"version": __version__, "config": config.to_json(), "frames": frames, "checkpoint": dict(checkpoint)}
    return hashlib.sha256(to_json_text(described, sort_keys=True).encode()).hexdigest()


def _digest(batches: Sequence[Batch]) -> str:
    """Return the digest of all observations in the order in which they were given."""
    arrays = {
        place: (batch.image[row : row + 1], batch.input_ids[row : row + 1])
        for batch in batches
        for row, place in enumerate(batch.places)
    }
    digest = FramesDigest()
    for place in sorted(arrays):
        digest.add(arrays[place])
    return str(digest)
