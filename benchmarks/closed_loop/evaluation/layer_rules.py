"""Rules for dropping decoder layers that the package does not offer: variations of its rules, and controls.

All measure the unpruned policy on the same calibration frames, as `evla_compile.calibration.calibrate` does.
"""

import math
import random
from collections.abc import Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor, fx

from evla_compile.calibration.calibrate import calibrate
from evla_compile.calibration.layer_importance import LayerObserver
from evla_compile.families.cogact.capture import capture
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.host.frames import Frame
from evla_compile.passes import ExposeStages
from evla_compile.settings.config import CompileConfig

OtherRule: TypeAlias = Literal["random", "last", "keep-last", "cognition"]
"""`random`, `last`: controls. `keep-last`: the paper's, but the last layer stays. `cognition`: the paper's at the
cognition token alone."""
OTHER_RULES: tuple[OtherRule, ...] = get_args(OtherRule)


def kept_by_rule(
    policy: CogACT, frames: Sequence[Frame], rule: OtherRule, count: int, *, seed: int = 0
) -> tuple[int, ...]:
    """Return the indices of the `count` layers that stay, ascending.

    Args:
        policy: the unpruned policy.
        frames: calibration frames.
        rule: see `OtherRule`.
        count: layers that stay.
        seed: which draw of `random`.
    """
    layers = policy.sizes.language.layers
    if rule == "last":
        return tuple(range(count))
    if rule == "random":
        return tuple(sorted(random.Random(seed).sample(range(layers), count)))  # noqa: S311  # a control
    if rule == "cognition":
        importance = cognition_importance(policy, frames)
    else:
        importance = list(calibrate(policy, frames, CompileConfig.dense(), progress=False).layer_importance)
    if rule == "keep-last":
        importance[-1] = math.inf
    ranked = sorted(range(layers), key=lambda layer: (importance[layer], layer))
    return tuple(sorted(ranked[layers - count :]))


def cognition_importance(policy: CogACT, frames: Sequence[Frame]) -> list[float]:
    """Return 1 - the mean cosine of every layer's input and output at the cognition token, which is the last."""
    observer = LayerObserver(_perception(policy), positions=slice(-1, None))
    with torch.no_grad():
        for inputs in _inputs(policy, frames):
            observer.run(*inputs)
    return list(observer.importance())


def _perception(policy: CogACT) -> fx.GraphModule:
    graph, _ = ExposeStages(stages=("cognition",))(capture(policy, CompileConfig.dense()))
    return graph


def _inputs(policy: CogACT, frames: Sequence[Frame]) -> Iterator[tuple[Tensor, ...]]:
    """Yield the captured graph's inputs for each frame, prompts unpadded."""
    action = policy.sizes.action
    for image, instruction in frames:
        ids = torch.tensor([policy.processor.prompt_ids(instruction)])
        pixels = torch.from_numpy(policy.processor.image(image))[None]
        noise = torch.zeros(1, action.chunk, action.action_width)
        yield pixels, ids, torch.tensor([ids.shape[1]]), noise, torch.zeros(1)
