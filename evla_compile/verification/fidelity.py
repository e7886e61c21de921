"""Measure how far a policy's actions are from the dense policy's, on any backend and on recorded frames."""

from collections.abc import Sequence

from evla_compile.calibration.progress import drawing_progress
from evla_compile.compiler.fidelity import dense_chunks
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.fidelity.chunks import DRAWS, ActionChunks, check_draws, count_calls, sample_chunks
from evla_compile.fidelity.measure import HORIZON, Fidelity, compare_chunks
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.frames import Frame, as_frames
from evla_compile.host.predictor import Predictor
from evla_compile.settings.config import CFG_SCALE, CompileConfig


@own_torch_state()
def record_chunks(
    policy: CogACT | Predictor,
    frames: Sequence[Frame],
    *,
    draws: int = DRAWS,
    cfg_scale: float = CFG_SCALE,
    progress: bool = True,
) -> ActionChunks:
    """Return a policy's action chunks on frames, to keep or to compare: the dense policy need not run twice.

    Args:
        policy: the dense policy, which runs layer by layer over all frames, so that every weight is read once; or a
            compiled one on any backend.
        frames: observations, (image, instruction) pairs.
        draws: noises that each frame is run from.
        cfg_scale: guidance of the dense policy; a compiled one has its own.
        progress: whether to draw a progress bar on standard error.

    Raises:
        ValueError: there are no frames, one is refused, or `draws` is out of range.
        EvlaError: a sample is not finite.
    """
    observations = as_frames(frames)
    check_draws(draws, observations)
    with drawing_progress(wanted=progress) as bar:
        if isinstance(policy, CogACT):
            graph = capture(policy, CompileConfig.dense())
            return dense_chunks(policy, observations, graph, bar, draws=draws, cfg_scale=cfg_scale)
        calls = count_calls(len(observations), draws, policy.signature.batch_size)
        return sample_chunks(policy, observations, draws, bar.step("Running the policy", calls))


def measure_fidelity(
    policy: Predictor | ActionChunks,
    reference: CogACT | Predictor | ActionChunks,
    frames: Sequence[Frame],
    *,
    draws: int = DRAWS,
    horizon: int = HORIZON,
    unnorm_key: str | None = None,
    progress: bool = True,
) -> Fidelity:
    """Compare a policy's actions with those of the dense one, on the same frames and from equal noise.

    Args:
        policy: a compiled policy on any backend, or what `record_chunks` returned for it.
        reference: the dense policy, another one, or what `record_chunks` returned for it.
        frames: observations, (image, instruction) pairs; best those that nothing was calibrated on.
        draws: noises that each frame is run from, 2 at least.
        horizon: actions of a chunk that a robot executes before the next call.
        unnorm_key: name of the dataset whose statistics scale the actions; None where only one is known.
        progress: whether to draw progress bars on standard error.

    Raises:
        CalibrationError: recorded chunks are of other frames, or of too few draws.
        ValueError: there are no frames, one is refused, both policies are recorded, or a number is out of range.
        EvlaError: a sample is not finite.
    """
    observations = as_frames(frames)
    named = next((each for each in (policy, reference) if not isinstance(each, ActionChunks)), None)
    if named is None:
        raise ValueError("both policies are recorded: give one that is not, whose statistics scale the actions")
    statistics = named.processor.statistics_for(unnorm_key)  # refuses a wrong name before anything runs
    cfg_scale = policy.config.cfg_scale if isinstance(policy, Predictor) else CFG_SCALE
    found, right = (
        each
        if isinstance(each, ActionChunks)
        else record_chunks(each, observations, draws=draws, cfg_scale=cfg_scale, progress=progress)
        for each in (policy, reference)
    )
    return compare_chunks(right, found, statistics, observations, horizon=horizon)
