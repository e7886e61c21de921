"""Turn the contents of a checkpoint file into tensors by "group.key": its groups, its action head, strict keys."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from evla_compile.errors import CheckpointError
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.settings.sizes import ModelSizes

_LOG = logging.getLogger(__name__)

_HEAD, _AVERAGED_HEAD = "action_model", "ema_diffusion"  # the latter is a moving average of the former
_GROUPS = ("vision_backbone", "projector", "llm_backbone", _HEAD)
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module")
"""Prefixes that DistributedDataParallel, torch.compile and FSDP add to the names of what they wrap."""
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMED_KEYS = 20


def read_groups(contents: object, *, use_ema: bool | None = False) -> dict[str, Tensor]:
    """Return the tensors that make up the policy by "group.key".

    A prefix of a training wrapper that is common to all group names, or to all keys of a group, is removed, with a
    warning.

    Args:
        contents: contents of a checkpoint as torch.load returns them, {"model": {group: {key: tensor}}}.
        use_ema: take the moving average `ema_diffusion` as `action_model`; None takes it where it is the only one.

    Raises:
        CheckpointError: groups are missing or unknown, or are not of tensors by name.
    """
    groups = contents.get("model") if isinstance(contents, Mapping) else None
    if not isinstance(groups, Mapping):
        found = listed([str(key) for key in contents]) if isinstance(contents, Mapping) else type(contents).__name__
        raise CheckpointError(
            f'expected {{"model": {{group: {{key: tensor}}}}}}, found {found}; give a CogACT checkpoint'
        )
    groups = _with_chosen_head(_unwrapped(groups, "the groups"), use_ema=use_ema)
    missing = [group for group in _GROUPS if group not in groups]
    if missing or set(groups) - set(_GROUPS):
        foreign = missing and {"projector", "llm_backbone"} <= set(groups)
        raise CheckpointError(
            f"expected the groups {', '.join(_GROUPS)} (and perhaps {_AVERAGED_HEAD}), found"
            f" {listed([str(group) for group in groups])}"
            + (f"; without {' and '.join(missing)} it is an OpenVLA or Prismatic file, not CogACT's" if foreign else "")
        )
    tensors = {}
    for group in _GROUPS:
        if not isinstance(groups[group], Mapping):
            raise CheckpointError(f"group {group!r}: expected tensors by key, found {type(groups[group]).__name__}")
        for key, tensor in _unwrapped(groups[group], group).items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{group}.{key}: expected a tensor, found {type(tensor).__name__}")
            tensors[f"{group}.{key}"] = tensor.detach()  # a parameter may have been saved as one
    return tensors


def _with_chosen_head(groups: Mapping[str, Any], *, use_ema: bool | None) -> dict[str, Any]:
    """Return the groups with one action head, under the name of the trained one."""
    chosen = dict(groups)
    average = chosen.pop(_AVERAGED_HEAD, None)
    if use_ema and average is None:
        raise CheckpointError(
            f"use_ema=True: expected the moving average of the action head, found no group {_AVERAGED_HEAD} among"
            f" {listed([str(group) for group in groups])}; load it without use_ema"
        )
    if average is None or (_HEAD in chosen and not use_ema):
        return chosen
    if use_ema is False:
        raise CheckpointError(
            f"expected the group {_HEAD}, found the moving average of the action head, {_AVERAGED_HEAD}, alone; load it"
            " with use_ema=True (evla compile --use-ema)"
        )
    return chosen | {_HEAD: average}


def _unwrapped(named: Mapping[str, Any], owner: str) -> Mapping[str, Any]:
    """Return a mapping whose names lack the prefixes of training wrappers that are common to all of them."""
    if foreign := [name for name in named if not isinstance(name, str)]:
        raise CheckpointError(f"{owner}: expected names in text, found {foreign[0]!r:.60}")
    prefix = ""
    while named and (shared := next((w for w in _WRAPPERS if all(name.startswith(w + ".") for name in named)), None)):
        named = {name.removeprefix(shared + "."): value for name, value in named.items()}
        prefix += shared + "."
    if prefix:
        _LOG.warning("%s: every name begins with %r, which a training wrapper left; read without it", owner, prefix)
    for wrapper in _WRAPPERS:
        wrapped = [name for name in named if wrapper in name.split(".")]
        if wrapped:
            raise CheckpointError(
                f"{owner}: {len(wrapped)} of {len(named)} keys hold '{wrapper}.', such as {wrapped[0]}, which a"
                " training wrapper left: expected CogACT's own key names; save the state_dict of what is wrapped"
                f" (model.module, model._orig_mod, or FSDP's full state dict), or take '{wrapper}.' out of these keys"
            )
    return named


def check_keys(model: CogACT, tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that are not exactly those of `model`, except some unused ones of the official files.

    Raises:
        CheckpointError: the message lists missing and unexpected names, other shapes, other dtypes, and tensors
            that were saved on the meta device, without values.
    """
    expected: dict[str, Tensor] = model.state_dict()
    shared = [name for name in expected if name in tensors]
    ignored = _ignored_prefixes(model.sizes)
    faults = {
        "missing keys": [name for name in expected if name not in tensors],
        "unexpected keys": [
            name
            for name in tensors
            if name not in expected and not name.startswith(ignored) and not name.endswith(".rotary_emb.inv_freq")
        ],
        "wrong shapes": [
            f"{name} (expected {list(expected[name].shape)}, found {list(tensors[name].shape)})"
            for name in shared
            if expected[name].shape != tensors[name].shape
        ],
        "wrong types": [
            f"{name} (expected dense floating point with values, found {read.dtype}, {read.layout}, {read.device})"
            for name in shared
            if (read := tensors[name]).dtype not in _STORED_DTYPES or read.layout != torch.strided or read.is_meta
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {listed(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(f"expected CogACT's tensors by group.key, found {found}; is the file cut or converted?")


def _ignored_prefixes(sizes: ModelSizes) -> tuple[str, ...]:
    """Return prefixes of the names of tensors that are in official files and that the policy never reads."""
    towers = (("dino", sizes.dino.depth), ("siglip", sizes.siglip.depth))
    return (
        "llm_backbone.llm.lm_head.",
        "action_model.net.history_embedder.",
        *(
            f"vision_backbone.{tower}_featurizer.{part}."
            for tower, depth in towers
            for part in (f"blocks.{depth - 1}", "norm", "attn_pool")
        ),
    )


def listed(names: Sequence[str]) -> str:
    """Return names joined by commas; of many, the first ones and the number of the others."""
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return ", ".join(names[:_NAMED_KEYS]) + more
