"""Fingerprints of the weights, by group, and of the frames that a plan was measured on."""

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from evla_compile.errors import CalibrationError
from evla_compile.graph.deferred import values_at
from evla_compile.settings.plan import DIGEST_DIGITS, Plan

_STRETCHES, _STRETCH = 4, 64  # read of every tensor: few runs of values, since each run reads a page of a mapped file
_SOMETIMES = frozenset({"action_model.net.z_embedder.uncondition"})  # a graph without guidance lacks it


def fingerprint_weights(weights: Mapping[str, Tensor]) -> tuple[tuple[str, str], ...]:
    """Return a digest of the weights of each group (`vision_backbone`, `projector`, ...), by its name.

    It covers the name and shape of every tensor, and 256 of its values at fixed positions: so it is cheap for mapped or
    deferred weights, and does not notice a change of a few other values. The values are rounded to bfloat16, so that a
    checkpoint has the same fingerprint in every dtype that `load` offers.

    Args:
        weights: tensors by "group.key", as in the policy's state dict.

    Raises:
        CalibrationError: a tensor is on the meta device, so it has no values.
    """
    groups: dict[str, hashlib._Hash] = {}
    with torch.no_grad():
        for name in sorted(weights.keys() - _SOMETIMES):
            weight = weights[name]
            if weight.is_meta:
                raise CalibrationError(
                    f"{name} is on the meta device, so the policy has no weights to tell it by: load a checkpoint"
                )
            digest = groups.setdefault(name.partition(".")[0], hashlib.sha256())
            digest.update(f"{name} {list(weight.shape)}\n".encode())
            sample = values_at(weight, _places(weight.numel())).to(torch.bfloat16)
            digest.update(sample.view(torch.int16).cpu().numpy().tobytes())
    return tuple((group, digest.hexdigest()[:DIGEST_DIGITS]) for group, digest in groups.items())


def check_checkpoint(plan: Plan, weights: Mapping[str, Tensor]) -> None:
    """Refuse a plan that was measured on other weights; a plan without measurements fits any weights.

    Args:
        plan: the plan.
        weights: tensors by "group.key", as in the state dict of the policy that it is meant for.

    Raises:
        CalibrationError: the message names the groups that differ and both fingerprints, or the weights have no values.
    """
    if not plan.checkpoint:
        return
    measured, found = dict(plan.checkpoint), dict(fingerprint_weights(weights))
    differing = [
        f"{group} {measured.get(group, 'absent')} there and {found.get(group, 'absent')} here"
        for group in sorted(measured.keys() | found.keys())
        if measured.get(group) != found.get(group)
    ]
    if differing:
        raise CalibrationError(
            f"the plan was measured on another checkpoint, by the fingerprints of its weights:"
            f" {', '.join(differing)}; calibrate this policy, or load the checkpoint that the plan was measured on"
        )


class FramesDigest:
    """Digest of observations as the policy sees them: squashed pixels and token ids."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def add(self, arrays: Iterable[Tensor]) -> None:
        """Add the tensors of one observation, in a fixed order."""
        for array in arrays:
            self._digest.update(f"{list(array.shape)}\n".encode())
            self._digest.update(array.cpu().numpy().tobytes())

    def __str__(self) -> str:
        return self._digest.hexdigest()[:DIGEST_DIGITS]


def _places(count: int) -> Tensor:
    """Return the flat positions that are read of a tensor with `count` values, ascending int64 [at most 256]."""
    if count <= _STRETCHES * _STRETCH:
        return torch.arange(count, device="cpu")
    starts = [(count - _STRETCH) * stretch // (_STRETCHES - 1) for stretch in range(_STRETCHES)]
    return torch.cat([torch.arange(start, start + _STRETCH, device="cpu") for start in starts])
