"""CogACT's official checkpoints, unchanged, to a policy: strict keys, sizes from shapes, tensors cast one at a time."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evla_compile.deferred import DeferredWeight
from evla_compile.errors import CheckpointError, EvlaError, UnsupportedModelError
from evla_compile.mapped_archive import read_archive
from evla_compile.memory import available_memory
from evla_compile.model.policy import CogACT, ModelSizes
from evla_compile.processor import (
    BLANK_ID,
    PAD_ID,
    WORD_BOUNDARY,
    ActionStatistics,
    Processor,
    read_statistics,
)
from evla_compile.run_directory import find_checkpoint, find_tokenizer, naming, read_json, read_text
from evla_compile.sizes import check_joints, infer_sizes

_GROUPS = ("vision_backbone", "projector", "llm_backbone", "action_model")
_OPTIONAL_GROUP = "ema_diffusion"  # a moving average of action_model, which inference does not use
_STORED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_NAMED_KEYS = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The contents of a run directory."""

    file: Path
    """The .pt file."""
    tensors: Mapping[str, Tensor]
    """Tensors by "group.key", mapped from the file; those of `ema_diffusion` are left out."""
    sizes: ModelSizes
    """Sizes of the model, read off the shapes."""
    statistics: Mapping[str, ActionStatistics]
    """Action statistics by dataset name."""
    pad_id: int
    """Token id that fills a prompt up to its budget."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.file.parent.parent


def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    deferred: bool = False,
) -> CogACT:
    """Load a CogACT policy from its official, unchanged files, ready for inference, with gradients off.

    The file is mapped: on a CPU, tensors that need no cast stay in it, so leave it as it is while the policy is in use.
    All others are cast one at a time. The action head stays float32 whatever `dtype` is.

    Weights may be written into, by `load_state_dict`, an optimizer or in place: what is written goes to memory of this
    process, page by page, never to the file. So a LoRA fine-tune is merged before compiling, for every layer it has::

        with torch.no_grad():
            for name, (a, b) in lora.items():  # a [R,inputs], b [outputs,R], scale = lora_alpha / R
                policy.get_parameter(name).add_(scale * (b @ a))

    What was compiled earlier does not follow in all its parts: compile again.

    Args:
        path: run directory (config.json, dataset_statistics.json and exactly one checkpoints/*.pt), a checkpoints/*.pt
            in such a directory, or a Hugging Face id such as "CogACT/CogACT-Base".
        tokenizer: Llama-2's tokenizer.json, or a folder that holds it; None takes the run directory's, else the one of
            openvla/openvla-7b on the hub.
        dtype: torch.float32 or torch.bfloat16, for the vision towers, the projector and the decoder.
        device: where the policy runs.
        deferred: cast each tensor where it is read and let go of the result, instead of casting all of them now: for
            compiling and exporting a policy that does not fit into memory in `dtype`. On a CPU only.

    Raises:
        CheckpointError: a file is missing, damaged or not in CogACT's layout, or the hub cannot be reached.
        UnsupportedModelError: the checkpoint is sound, but its architecture cannot be built or told from shapes.
        ValueError: `dtype` or `device` cannot be used.
        EvlaError: the cast tensors would not fit into the memory that is free.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: expected torch.float32 or torch.bfloat16; float16 overflows in the decoder")
    target = _usable_device(device)
    checkpoint = read_checkpoint(path)
    tokenizer_file = find_tokenizer(tokenizer, checkpoint.run)
    tokenizer_json = read_text(tokenizer_file)
    with naming(tokenizer_file):
        processor = Processor(
            tokenizer_json=tokenizer_json,
            statistics=checkpoint.statistics,
            image_side=checkpoint.sizes.image_side,
            pad_id=checkpoint.pad_id,
        )
        _check_vocabulary(processor, checkpoint.sizes.language.vocabulary)
    with torch.device("meta"):
        model = CogACT(checkpoint.sizes, processor)
    with naming(checkpoint.file):
        _check_keys(model, checkpoint.tensors)
        check_joints(checkpoint.sizes)
    if deferred and target.type != "cpu":
        raise ValueError(f"deferred=True with device={str(device)!r}: deferred weights stay in the file, on the CPU")
    dtypes = {name: torch.float32 if name.startswith("action_model.") else dtype for name in model.state_dict()}
    stored = {name: checkpoint.tensors[name] for name in dtypes}
    if target.type == "cpu" and not deferred:
        _check_memory(stored, dtypes)
    weights = {
        name: DeferredWeight(tensor, dtype=dtypes[name])
        if deferred and tensor.dtype != dtypes[name]
        else tensor.to(device=target, dtype=dtypes[name])
        for name, tensor in stored.items()
    }
    model.load_state_dict(weights, assign=True)
    return model.eval().requires_grad_(False)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read what a checkpoint holds without building the policy or casting a weight; its keys are not checked.

    Args:
        path: see `load`.

    Raises:
        CheckpointError: a file is missing, damaged or not in CogACT's layout, or the hub cannot be reached.
        UnsupportedModelError: the checkpoint is sound, but its architecture cannot be told from shapes.
    """
    file = find_checkpoint(path)
    run = file.parent.parent
    settings = _read_settings(run / "config.json")
    statistics_json = read_json(run / "dataset_statistics.json")
    with naming(run / "dataset_statistics.json"):
        statistics = read_statistics(statistics_json)
    with naming(file):
        tensors = _flatten(_groups(read_archive(file)))
        sizes = infer_sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, settings.get("heads", {}))
        pad_id = _pad_id(settings.get("pad_id"), sizes.language.vocabulary)
    return Checkpoint(file=file, tensors=tensors, sizes=sizes, statistics=statistics, pad_id=pad_id)


def _check_memory(stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse casts whose results the machine cannot hold, before they take it down."""
    needed = sum(
        tensor.numel() * dtypes[name].itemsize for name, tensor in stored.items() if tensor.dtype != dtypes[name]
    )
    free = available_memory()
    if free is not None and needed > free:
        raise EvlaError(
            f"casting this checkpoint needs {needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: load it in"
            " the dtype that it is stored in, which needs none, or with deferred=True for compiling and exporting alone"
        )


def _usable_device(device: str | torch.device) -> torch.device:
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f'device={device!r}: expected a device of torch such as "cpu" or "cuda:0"') from error
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f'device={device!r}: this torch sees {torch.cuda.device_count()} CUDA devices; use "cpu"')
    return chosen


def _read_settings(file: Path) -> Mapping[str, Any]:
    """Return what config.json says for this package alone: `heads` by part and `pad_id`, both optional."""
    settings = read_json(file).get("evla_compile", {})
    if (
        not isinstance(settings, dict)
        or settings.keys() - {"heads", "pad_id"}
        or not isinstance(settings.get("heads", {}), dict)
    ):
        raise CheckpointError(
            f'{file}: expected "evla_compile" to be an object like {{"heads": {{"dit": 12}}, "pad_id": 32000}}, both'
            f" optional, found {json.dumps(settings):.100}"
        )
    return settings


def _check_vocabulary(processor: Processor, vocabulary: int) -> None:
    """Refuse a tokenizer that numbers pieces otherwise than the policy's: nothing else would tell."""
    blank = processor.blank_id
    if vocabulary > BLANK_ID and blank != BLANK_ID:
        raise CheckpointError(
            f"the tokenizer gives {WORD_BOUNDARY!r} the id {blank}, not {BLANK_ID}, and the embedding has {vocabulary}"
            " rows, like Llama-2's: give Llama-2's tokenizer.json, as in openvla/openvla-7b"
        )
    if processor.largest_id >= vocabulary:
        raise CheckpointError(
            f"the tokenizer has {processor.vocabulary} pieces, ids up to {processor.largest_id}, and gives"
            f" {WORD_BOUNDARY!r} the id {blank}, but the embedding has {vocabulary} rows: give the tokenizer.json that"
            " the policy was trained with"
        )


def _pad_id(given: object, vocabulary: int) -> int:
    if given is None and vocabulary <= PAD_ID:
        raise UnsupportedModelError(
            f"the embedding has {vocabulary} rows, so CogACT's padding id {PAD_ID} is not among them; add"
            ' {"evla_compile": {"pad_id": N}} to config.json, with any row in place of N'
        )
    pad_id = PAD_ID if given is None else given
    if isinstance(pad_id, bool) or not isinstance(pad_id, int) or not 0 <= pad_id < vocabulary:
        raise CheckpointError(
            f"config.json, evla_compile.pad_id = {given!r}: expected a row of the embedding, 0 to {vocabulary - 1}"
        )
    return pad_id


def _groups(contents: object) -> Mapping[str, Any]:
    """Return the groups of a checkpoint's contents."""
    groups = contents.get("model") if isinstance(contents, Mapping) else None
    if not isinstance(groups, Mapping):
        found = _listed([str(key) for key in contents]) if isinstance(contents, Mapping) else type(contents).__name__
        raise CheckpointError(
            f'expected {{"model": {{group: {{key: tensor}}}}}}, found {found}; give a CogACT checkpoint'
        )
    return groups


def _flatten(groups: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the tensors that make up the policy by "group.key"."""
    missing = [group for group in _GROUPS if group not in groups]
    if missing or set(groups) - {*_GROUPS, _OPTIONAL_GROUP}:
        foreign = missing and {"projector", "llm_backbone"} <= set(groups)
        raise CheckpointError(
            f"expected the groups {', '.join(_GROUPS)} (and perhaps {_OPTIONAL_GROUP}), found"
            f" {_listed([str(group) for group in groups])}"
            + (f"; without {' and '.join(missing)} it is an OpenVLA or Prismatic file, not CogACT's" if foreign else "")
        )
    tensors = {}
    for group in _GROUPS:
        if not isinstance(groups[group], Mapping):
            raise CheckpointError(f"group {group!r}: expected tensors by key, found {type(groups[group]).__name__}")
        for key, tensor in groups[group].items():
            if not isinstance(tensor, Tensor):
                raise CheckpointError(f"{group}.{key}: expected a tensor, found {type(tensor).__name__}")
            tensors[f"{group}.{key}"] = tensor.detach()  # a parameter may have been saved as one
    return tensors


def _check_keys(model: CogACT, tensors: Mapping[str, Tensor]) -> None:
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
            f"{name} (expected dense floating point, found {tensors[name].dtype}, {tensors[name].layout})"
            for name in shared
            if tensors[name].dtype not in _STORED_DTYPES or tensors[name].layout != torch.strided
        ],
    }
    if any(faults.values()):
        found = "; ".join(f"{len(names)} {fault}: {_listed(names)}" for fault, names in faults.items() if names)
        raise CheckpointError(f"expected CogACT's tensors by group.key, found {found}; is the file cut or converted?")


def _ignored_prefixes(sizes: ModelSizes) -> tuple[str, ...]:
    """Return the beginnings of the names of tensors that official files hold and the policy never reads."""
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


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _NAMED_KEYS} more" if len(names) > _NAMED_KEYS else ""
    return ", ".join(names[:_NAMED_KEYS]) + more
