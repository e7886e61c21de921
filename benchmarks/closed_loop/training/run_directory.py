"""From trained weights to an official run directory that `evla_compile.load` reads."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evla_compile.host.processor import GRIPPER, ActionStatistics, Processor
from evla_compile.settings.sizes import ACTION_WIDTH, ModelSizes

_GROUPS = ("vision_backbone", "projector", "llm_backbone", "action_model")


def action_statistics(actions: NDArray[np.float32]) -> ActionStatistics:
    """Return the 1st and 99th percentiles of actions [K,7]; the gripper stays as it is, as in CogACT's datasets."""
    low, high = np.percentile(actions.astype(np.float64), (1, 99), axis=0)
    return ActionStatistics(
        low=tuple(low.tolist()),
        high=tuple(high.tolist()),
        mask=tuple(i != GRIPPER for i in range(ACTION_WIDTH)),
    )


def write_run(folder: Path, sizes: ModelSizes, processor: Processor, weights: Mapping[str, Tensor], step: int) -> None:
    """Write an official run directory: float16 weights by group, statistics, tokenizer, head counts.

    Official files also have each tower's last block and norm, which the policy never reads; they are zeros here.

    Args:
        folder: the run directory; a checkpoint in it is replaced.
        sizes: sizes of the policy.
        processor: its tokenizer and statistics.
        weights: the policy's tensors by name.
        step: the training step, which names the file.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
    for name, tensor in sorted({**weights, **_unread(sizes, weights)}.items()):
        group, _, key = name.partition(".")
        if group in groups:
            groups[group][key] = tensor.detach().to("cpu", torch.float16).contiguous()
    heads = {
        "dino": sizes.dino.heads,
        "siglip": sizes.siglip.heads,
        "llm": sizes.language.heads,
        "dit": sizes.action.heads,
    }
    settings = {"evla_compile": {"heads": heads, "pad_id": processor.pad_id}}
    statistics = {name: entry.to_json() for name, entry in processor.statistics.items()}
    _write(folder / "config.json", json.dumps(settings, indent=2))
    _write(folder / "dataset_statistics.json", json.dumps(statistics, indent=2))
    _write(folder / "tokenizer.json", processor.tokenizer_json)
    new = checkpoints / f"step-{step:06}.pt"
    partial = checkpoints / "partial"
    torch.save({"model": groups}, partial)
    for old in checkpoints.glob("*.pt"):
        old.unlink()
    partial.replace(new)


def _unread(sizes: ModelSizes, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return zeros for each tower's last block and norm, in the shapes of the block before."""
    zeros = {}
    for tower, depth in (("dino", sizes.dino.depth), ("siglip", sizes.siglip.depth)):
        prefix = f"vision_backbone.{tower}_featurizer."
        last, before = f"{prefix}blocks.{depth - 1}.", f"{prefix}blocks.{depth - 2}."
        for name, tensor in weights.items():
            if name.startswith(before):
                zeros[name.replace(before, last)] = torch.zeros(tensor.shape)
        for leaf in ("weight", "bias"):
            zeros[f"{prefix}norm.{leaf}"] = torch.zeros(weights[f"{before}norm1.{leaf}"].shape)
    return zeros


def _write(file: Path, text: str) -> None:
    file.write_text(text if text.endswith("\n") else text + "\n", encoding="utf-8")
