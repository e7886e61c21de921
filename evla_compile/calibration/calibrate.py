"""Calibrate: measure on real observations which decoder layers and MLP neurons a policy needs least, and make the plan.

Both measures take one pass over the unpruned model, without padding and without training.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn, track
from torch import Tensor, fx
from torch.nn import functional

from evla_compile.calibration.fingerprint import FramesDigest, fingerprint_weights
from evla_compile.errors import CalibrationError
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.finite_weights import check_finite_policy
from evla_compile.graph.sites import argument, decoder_layers, module_path
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.camera_frame import CameraFrame
from evla_compile.host.frames import Frame, as_frames
from evla_compile.passes import ExposeStages, PruneLayers
from evla_compile.passes.lower_precision import float_operands, lowered_sites
from evla_compile.settings.anatomy import COGNITION
from evla_compile.settings.budgets.budget import Measured
from evla_compile.settings.budgets.layers import drop_trials
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan, planned
from evla_compile.terminal import new_console


@own_torch_state()
def calibrate(
    policy: CogACT, frames: Iterable[Frame], config: CompileConfig | None = None, *, progress: bool = True
) -> Plan:
    """Measure `policy` on `frames` and return the plan for the budgets of `config`.

    Layer importance is EfficientVLA's equation 1: I(l) = 1 - mean over frames of the mean over positions of
    cos(layer input, layer output), residual included, the last layer before the final norm; the lowest go, the lower
    index among equals. With `layer_rule="greedy"`, which is not in the paper, layers go one after the other, each time
    the one without which the cognition feature f changes least, by the mean over frames of |f - f_dense| / |f_dense|.
    To drop d of L layers, perception runs about d (L - d/2) times for every frame: at full size, give it few frames.

    A neuron's score is the mean over all tokens of |silu(gate) up| times the norm of its column of the down projection.
    Calibration also records the largest value in every layer that could be computed in half precision.

    Args:
        policy: the dense policy.
        frames: real observations of the robot's task, at least one, as (image, instruction) pairs.
        config: the budgets; None for the defaults of `CompileConfig`.
        progress: whether to draw a progress bar on standard error.

    Raises:
        CalibrationError: there are no frames, or the policy's values are not finite.
        CheckpointError: a weight has values that are not finite.
        ValueError: a frame or an instruction is refused by the processor, or a budget does not fit the policy.
    """
    config, sizes = config or CompileConfig(), policy.sizes
    config.decide(sizes, None)  # refuses budgets that do not fit, before anything is measured
    asked = config.measurements(sizes)
    observations = as_frames(frames)
    if not observations:
        raise CalibrationError("no calibration frames: give at least one real (image, instruction) observation")
    check_finite_policy(policy)
    observer = _Observer(policy, neurons="neuron_scores" in asked)
    bar = track(
        observations,
        description="Calibrating",
        console=new_console(stderr=True),
        transient=True,
        disable=not progress,
    )
    for image, instruction in bar:
        observer.observe(image, instruction)
    with _feature_shift(policy, observations, config, progress=progress) as shift:
        measured = Measured(
            layer_importance=observer.importance(),
            neuron_scores=observer.neuron_scores() if "neuron_scores" in asked else (),
            feature_shift=shift,
        )
        decisions = config.decide(sizes, measured)
    return Plan(
        decisions=planned(decisions),
        ranges=observer.ranges(),
        frames=len(observations),
        frames_digest=str(observer.frames_digest),
        checkpoint=fingerprint_weights(policy.state_dict()),
    )


class LayerObserver(fx.Interpreter):
    """Runs a graph with decoder layers, and measures the importance of each layer over all runs.

    Attributes:
        positions: which positions of the sequence are compared; the paper's score takes all.
    """

    def __init__(self, graph: fx.GraphModule, positions: slice = slice(None)) -> None:
        super().__init__(graph)
        self.positions = positions
        layers = decoder_layers(graph.graph)
        self._first = layers[0].entry
        self._exits = {layer.exit: place for place, layer in enumerate(layers)}
        self._cosines: list[list[float]] = [[] for _ in layers]
        self._hidden: Tensor | None = None

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and measure it where it ends a layer."""
        result = super().run_node(n)
        if n is self._first:
            self._hidden = result
        elif n in self._exits and self._hidden is not None:
            before, after = (states[:, self.positions].float() for states in (self._hidden, result))  # [B,S,D]
            cosine = functional.cosine_similarity(before, after, dim=-1)  # [B,S]
            self._cosines[self._exits[n]].append(cosine.mean().item())
            self._hidden = result
        return result

    def importance(self) -> tuple[float, ...]:
        """Return 1 - the mean cosine of every layer's input and output, in their order."""
        return tuple(1.0 - sum(values) / len(values) for values in self._cosines)


class _Observer(LayerObserver):
    """Runs the perception half of the captured graph, and measures layers, neurons and activation ranges."""

    def __init__(self, policy: CogACT, *, neurons: bool) -> None:
        graph = _perception(policy)
        super().__init__(graph)
        self._policy = policy
        layers = decoder_layers(graph.graph)
        gated = {argument(layer.named("mlp.down_proj"), 0): layer.index for layer in layers}
        self._gated = gated if neurons else {}
        self._downs = [argument(layer.named("mlp.down_proj"), 1) for layer in layers]
        self._activity: list[Tensor] = [torch.zeros(policy.sizes.language.mlp_width) for _ in layers]
        self._sites = list(lowered_sites(graph.graph))
        read = [value for site in self._sites for value in float_operands(site) if value.op != "get_attr"]
        self._largest: dict[fx.Node, float] = dict.fromkeys([*self._sites, *read], 0.0)
        self._tokens = 0
        self.frames_digest = FramesDigest()

    def observe(self, image: CameraFrame, instruction: str) -> None:
        """Measure one observation, its prompt unpadded."""
        inputs = _inputs(self._policy, image, instruction)
        self.frames_digest.add(inputs[:2])
        with torch.no_grad():
            self.run(*inputs)
        self._tokens += self._policy.sizes.patches + inputs[1].shape[1]

    def run_node(self, n: fx.Node) -> Any:
        """Run a node, and measure it where it ends a layer, feeds a down projection, or might be lowered."""
        result = super().run_node(n)
        if n in self._largest:
            largest = result.abs().max().item()
            if not math.isfinite(largest):
                raise CalibrationError(
                    f"{module_path(n) or n.name} yields {largest} on a calibration frame, so nothing can be measured:"
                    " the checkpoint is damaged, or was loaded in a dtype that it overflows"
                )
            self._largest[n] = max(self._largest[n], largest)
        if n in self._gated:
            self._activity[self._gated[n]] += result[0].float().abs().sum(0).cpu()  # [M] of [1,S,M]
        return result

    def ranges(self) -> tuple[tuple[str, float], ...]:
        """Return the largest absolute input or output of every layer that could be lowered, by its module path."""
        found: dict[str, float] = {}
        for site in self._sites:
            values = [self._largest[node] for node in (site, *float_operands(site)) if node in self._largest]
            found[module_path(site)] = max(found.get(module_path(site), 0.0), *values)
        return tuple(found.items())

    def neuron_scores(self) -> tuple[NDArray[np.float32], ...]:
        """Return the score of every neuron of every layer, float32 [M]."""
        norms = [self.fetch_attr(str(node.target)).float().norm(dim=0).cpu() for node in self._downs]
        return tuple(
            (activity / self._tokens * norm).numpy() for activity, norm in zip(self._activity, norms, strict=True)
        )


class _FeatureShift:
    """Measures how far the cognition feature moves with some decoder layers alone; see `Measured.feature_shift`."""

    def __init__(self, policy: CogACT, frames: Sequence[Frame], advance: Callable[[], None]) -> None:
        self._graph, self._inputs = _perception(policy), [_inputs(policy, *frame) for frame in frames]
        self._dense = _features(self._graph, self._inputs)
        self._advance = advance

    def __call__(self, keep: tuple[int, ...]) -> float:
        found = _features(PruneLayers(keep=keep)(self._graph)[0], self._inputs)
        self._advance()
        moved = (found - self._dense).norm(dim=-1) / self._dense.norm(dim=-1)  # [F]
        return float(moved.mean())


@contextmanager
def _feature_shift(
    policy: CogACT, frames: Sequence[Frame], config: CompileConfig, *, progress: bool
) -> Iterator[Callable[[tuple[int, ...]], float] | None]:
    """Yield what measures shifts of the feature, and draw a progress bar meanwhile; None where no budget needs it."""
    if "feature_shift" not in config.measurements(policy.sizes):
        yield None
        return
    columns = (TextColumn("Dropping layers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=new_console(stderr=True), transient=True, disable=not progress) as bar:
        trials = drop_trials(policy.sizes.language.layers, config.kept_layer_count(policy.sizes))
        task = bar.add_task("", total=trials)
        yield _FeatureShift(policy, frames, lambda: bar.advance(task))


def _perception(policy: CogACT) -> fx.GraphModule:
    """Return the captured graph up to the cognition feature."""
    return ExposeStages(stages=(COGNITION,))(capture(policy, CompileConfig.dense()))[0]


def _features(graph: fx.GraphModule, inputs: Sequence[tuple[Tensor, ...]]) -> Tensor:
    """Return the cognition feature of each observation, float32 [F,D]."""
    with torch.no_grad():
        return torch.cat([graph(*arrays)[0].flatten(1).float() for arrays in inputs])


def _inputs(policy: CogACT, image: CameraFrame, instruction: str) -> tuple[Tensor, ...]:
    """Return the captured graph's inputs for one observation, its prompt unpadded; it denoises nothing."""
    processor, action = policy.processor, policy.sizes.action
    device = next(policy.parameters()).device
    ids = torch.tensor([processor.prompt_ids(instruction)], device=device)
    return (
        torch.from_numpy(processor.image(image))[None].to(device),
        ids,
        torch.tensor([ids.shape[1]], device=device),
        torch.zeros(1, action.chunk, action.action_width, device=device),
        torch.zeros(1, device=device),
    )
