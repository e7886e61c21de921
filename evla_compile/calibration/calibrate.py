"""Calibrate: measure on real observations what a policy can spare, repair what is left, and make the plan.

Everything is measured without padding and without training. The policy runs layer by layer over all frames, so that
every weight is read once for all of them.
"""

from collections.abc import Iterable, Sequence
from functools import partial

from torch import fx

from evla_compile.calibration.action_shift import ActionShift
from evla_compile.calibration.cache_search import CachedRun
from evla_compile.calibration.dense_measures import DenseMeasures, DenseRun
from evla_compile.calibration.feature_shift import FeatureShift
from evla_compile.calibration.fingerprint import FramesDigest, fingerprint_weights
from evla_compile.calibration.held_out import split_frames
from evla_compile.calibration.progress import drawing_progress
from evla_compile.calibration.repair_trials import RepairTrials
from evla_compile.calibration.solver_search import SolverRun
from evla_compile.calibration.streams import Batch, Shelf, batches_of
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.finite_weights import check_finite_policy
from evla_compile.graph.plan_tensors import to_plan_tensor
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame, as_frames
from evla_compile.settings.budgets.budget import Measured
from evla_compile.settings.budgets.layers import drop_trials
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, planned


@own_torch_state()
def calibrate(
    policy: CogACT, frames: Iterable[Frame], config: CompileConfig | None = None, *, progress: bool = True
) -> Plan:
    """Measure `policy` on `frames` and return the plan for the budgets of `config`.

    Layer importance is EfficientVLA's equation 1: I(l) = 1 - mean over frames of the mean over positions of
    cos(layer input, layer output), residual included, the last layer before the final norm; the lowest go, the lower
    index among equals. With `layer_rule="greedy"`, which is not in the paper, layers go one after the other, each time
    the one without which the cognition feature f changes least, by the mean over frames of |f - f_dense| / |f_dense|.
    To drop d of L layers, the decoder runs up to d (L - d/2) times for every frame: at full size, give it few frames.

    A number of denoising steps that compute (`cache_steps`), or of a solver's timesteps (`solver_steps`), is decided by
    trying all sets of that many, on the dense policy's cognition features: that is taken with which the actions are
    nearest to those of all steps of DDIM, from equal noise.

    A neuron's score is the mean over all tokens of |silu(gate) up| times the norm of its column of the down projection.
    Calibration also records the largest value in every layer that could be computed in half precision.

    With `repair`, the projections of the layers that stay are refit to the dense policy, see
    `evla_compile.calibration.repair`, on most of the episodes; the others decide which repair is taken, if any.

    Args:
        policy: the dense policy.
        frames: real observations of the robot's task, at least one, as (image, instruction) pairs; a repair needs about
            40 of each instruction, and takes the episode of each, `Frame.episode`, into account.
        config: the budgets; None for the defaults of `CompileConfig`.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CalibrationError: there are no frames, too few for a repair, or the policy's values are not finite.
        CheckpointError: a weight has values that are not finite.
        ValueError: a frame or an instruction is refused by the processor, or a budget does not fit the policy.
    """
    config = (config or CompileConfig()).resolve(policy.sizes)
    plan, _ = measure(policy, frames, config, progress=progress)
    return plan


@own_torch_state()
def measure(
    policy: CogACT, frames: Iterable[Frame], config: CompileConfig, *, progress: bool
) -> tuple[Plan, fx.GraphModule]:
    """Return the plan of `calibrate`, and the captured policy that it was measured on."""
    sizes = policy.sizes
    config.decide(sizes, None)  # refuses budgets that do not fit, before anything is measured
    asked = config.measurements(sizes)
    observations = as_frames(frames)
    if not observations:
        raise CalibrationError("no calibration frames: give at least one real (image, instruction) observation")
    split = split_frames(observations, config.repair_frames) if "repair" in asked else None
    check_finite_policy(policy)
    graph = capture(policy, config)
    batches, shelf = batches_of(policy, observations), Shelf()
    trials = None if split is None else RepairTrials(policy, graph, batches, split, config, shelf)
    run = DenseRun(graph, batches, shelf)
    found = DenseMeasures(run, len(observations), neurons="neuron_scores" in asked)
    with drawing_progress(wanted=progress) as bar:
        start = run.start("front")
        start.advance(run.front, found.watch, bar.step("Calibrating: vision", run.walk.count_to(run.front)))
        dense = start.fork("dense")
        dense.advance(run.readout, found.watch, bar.step("Calibrating: decoder", len(run.walk.stretches) - start.done))
        features = run.features(dense)
        dense.close()
        shift = None
        if "feature_shift" in asked:
            count = drop_trials(sizes.language.layers, config.kept_layer_count(sizes))
            shift = FeatureShift(run, start, features, bar.step("Dropping layers", count))
        if trials is not None:
            trials.prepare(run, start, features, bar)
        solver_shift = cache_shift = None
        if "solver_shift" in asked:
            begin = partial(bar.step, "Choosing timesteps", len(config.timestep_sets()))
            solver_shift = ActionShift(policy, features, config, partial(SolverRun, policy, config), begin)
        if "cache_shift" in asked:
            begin = partial(bar.step, "Choosing denoising steps", config.cache_candidates)
            cache_shift = ActionShift(policy, features, config, partial(CachedRun, policy, config), begin)
        decisions = config.decide(
            sizes,
            Measured(
                layer_importance=found.importance(),
                neuron_scores=found.neuron_scores(),
                feature_shift=shift,
                repair=trials,
                solver_shift=solver_shift,
                cache_shift=cache_shift,
            ),
        )
    refit = {} if trials is None else trials.tensors
    plan = Plan(
        decisions=planned(decisions),
        ranges=found.ranges(),
        frames=len(observations),
        frames_digest=_digest(batches),
        checkpoint=fingerprint_weights(policy.state_dict()),
        tensors={name: to_plan_tensor(tensor) for name, tensor in refit.items()},
    )
    return plan, graph


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
