"""Load CogACT's official checkpoints, unchanged: strict keys, sizes from shapes, tensors cast one at a time."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from evla_compile.errors import CheckpointError, EvlaError, UnsupportedModelError
from evla_compile.families.cogact.loading.checkpoint_groups import check_keys, read_groups
from evla_compile.families.cogact.loading.mapped_archive import read_archive
from evla_compile.families.cogact.loading.run_directory import (
    find_checkpoint,
    find_tokenizer,
    naming,
    read_json,
    read_text,
)
from evla_compile.families.cogact.loading.sizes_from_shapes import check_action_width, check_joints, infer_sizes
from evla_compile.families.cogact.model.policy import CogACT
from evla_compile.graph.deferred import DeferredWeight
from evla_compile.graph.torch_state import own_torch_state
from evla_compile.host.processor import BLANK_ID, PAD_ID, WORD_BOUNDARY, ActionStatistics, Processor, read_statistics
from evla_compile.memory import available_memory
from evla_compile.settings.sizes import ACTION_WIDTH, ModelSizes
from evla_compile.units import bytes_text

_LOG = logging.getLogger(__name__)

_BASE_MODELS = ("prism-dinosiglip-224px+7b", "prism-dinosiglip-224px-controlled+7b")
"""Base models with the prompt and the resize of this package: Llama-2 without chat, frames squashed to 224 pixels."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """The contents of a run directory."""

    file: Path
    """The .pt file."""
    tensors: Mapping[str, Tensor]
    """Tensors by "group.key", mapped from the file; the chosen action head is `action_model`."""
    sizes: ModelSizes
    """Sizes of the model, derived from the shapes."""
    statistics: Mapping[str, ActionStatistics]
    """Action statistics by name of the datasets whose actions are as wide as the policy's."""
    pad_id: int
    """Token id that fills a prompt up to its budget."""

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.file.parent.parent


@own_torch_state()
def load(
    path: str | Path,
    tokenizer: str | Path | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    *,
    use_ema: bool = False,
    deferred: bool = False,
) -> CogACT:
    """Load a CogACT policy from its official, unchanged files, ready for inference, with gradients off.

    The file is mapped: on a CPU, tensors that need no cast are read from it, so do not change it while the policy is in
    use. All others are cast one at a time. The action head is float32 for every `dtype`.

    Weights may be written into, by `load_state_dict`, an optimizer or in place: pages that are written are copied to
    memory, and the file never changes. So a LoRA fine-tune can be merged before compiling, for every layer it has::

        with torch.no_grad():
            for name, (a, b) in lora.items():  # a [R,inputs], b [outputs,R], scale = lora_alpha / R
                policy.get_parameter(name).add_(scale * (b @ a))

    A policy that was compiled earlier contains some weights in changed form, so compile it again.

    Args:
        path: run directory (config.json, dataset_statistics.json and exactly one checkpoints/*.pt), a checkpoints/*.pt
            in such a directory, or a Hugging Face id such as "CogACT/CogACT-Base".
        tokenizer: Llama-2's tokenizer.json, or its folder; None for the run directory's, else that of
            openvla/openvla-7b on the hub.
        dtype: torch.float32 or torch.bfloat16, for the vision towers, the projector and the decoder.
        device: where the policy runs.
        use_ema: take the moving average of the action head, `ema_diffusion`, which some training runs save.
        deferred: cast each tensor when it is read and then free the result, instead of casting all tensors now: for
            compiling and exporting a policy that does not fit into memory in `dtype`. On a CPU only.

    Raises:
        CheckpointError: a file is missing, damaged or not in CogACT's layout, or the hub cannot be reached.
        UnsupportedModelError: the checkpoint is sound, but its architecture cannot be built or derived from shapes.
        ValueError: `dtype` or `device` cannot be used.
        EvlaError: the cast tensors would not fit into the memory that is free.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype={dtype}: expected torch.float32 or torch.bfloat16; float16 overflows in the decoder")
    target = _usable_device(device)
    checkpoint = read_checkpoint(path, use_ema=use_ema)
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
        check_keys(model, checkpoint.tensors)
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


def read_checkpoint(path: str | Path, *, use_ema: bool | None = False) -> Checkpoint:
    """Read a checkpoint without building the policy or casting a weight; its keys are not checked.

    Args:
        path: see `load`.
        use_ema: see `load`; None takes the moving average where it is the only action head, to inspect shapes.

    Raises:
        CheckpointError: a file is missing, damaged or not in CogACT's layout, or the hub cannot be reached.
        UnsupportedModelError: the checkpoint is sound, but its architecture cannot be derived from shapes, its actions
            do not have 7 numbers, or its base model has another prompt.
    """
    file = find_checkpoint(path)
    run = file.parent.parent
    config = read_json(run / "config.json")
    with naming(run / "config.json"):
        settings = _read_settings(config)
        _check_base_model(config)
    statistics_json = read_json(run / "dataset_statistics.json")
    with naming(file):
        tensors = read_groups(read_archive(file), use_ema=use_ema)
        sizes = infer_sizes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, settings.get("heads", {}))
        pad_id = _pad_id(settings.get("pad_id"), sizes.language.vocabulary)
        check_action_width(sizes)  # before the statistics, which would have the same wrong width
    with naming(run / "dataset_statistics.json"):
        statistics = _fitting_statistics(statistics_json)
    return Checkpoint(file=file, tensors=tensors, sizes=sizes, statistics=statistics, pad_id=pad_id)


def read_sound_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint without its weights, and check that its modules fit together; see `load`.

    Raises:
        CheckpointError: a file is missing, damaged or not in CogACT's layout, or its parts do not fit together.
        UnsupportedModelError: the checkpoint is sound, but its architecture cannot be built or derived from shapes.
    """
    checkpoint = read_checkpoint(path, use_ema=None)
    with naming(checkpoint.file):
        check_joints(checkpoint.sizes)
    return checkpoint


def _fitting_statistics(datasets: Mapping[str, Any]) -> dict[str, ActionStatistics]:
    """Read the statistics of the datasets whose actions have 7 numbers; others are left out, with a warning."""
    widths = {dataset: _action_width(entry) for dataset, entry in datasets.items()}
    other = {dataset: width for dataset, width in widths.items() if width not in (None, ACTION_WIDTH)}
    named = ", ".join(f"{dataset!r} has {width}" for dataset, width in other.items())
    if other and len(other) == len(datasets):
        raise CheckpointError(
            f"expected the statistics of a dataset whose actions have {ACTION_WIDTH} numbers, found none: {named:.500};"
            " give the statistics of the data that this policy was trained on"
        )
    if other:
        _LOG.warning("dataset_statistics.json: left out, actions have not %d numbers: %s", ACTION_WIDTH, named)
    return read_statistics({dataset: entry for dataset, entry in datasets.items() if dataset not in other})


def _action_width(entry: object) -> int | None:
    """Return how many numbers the actions of a dataset have, None where its entry is malformed."""
    action = entry.get("action") if isinstance(entry, Mapping) else None
    low, high = (action.get(key) if isinstance(action, Mapping) else None for key in ("q01", "q99"))
    return len(low) if isinstance(low, list) and isinstance(high, list) and len(low) == len(high) else None


def _check_base_model(config: Mapping[str, Any]) -> None:
    """Refuse a vision-language model with another prompt or resize, which nothing else in the files shows."""
    vla = config.get("vla", {})
    base = vla.get("base_vlm", _BASE_MODELS[0]) if isinstance(vla, Mapping) else None
    if not isinstance(base, str):
        raise CheckpointError(
            f'expected "vla" to be an object with the name of a model as "base_vlm", found {vla!r:.100}'
        )
    if not set(_BASE_MODELS) & set(PurePosixPath(base).parts):  # a run may name the path of the model's folder
        raise UnsupportedModelError(
            f"vla.base_vlm is {base!r}: expected {' or '.join(_BASE_MODELS)}, whose prompt and resize are the ones"
            " built in here, and with others the policy would act wrongly; if yours has the same two, name"
            f" {_BASE_MODELS[0]!r} instead"
        )


def _check_memory(stored: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]) -> None:
    """Refuse casts whose results do not fit into free memory, before the machine runs out of it."""
    needed = sum(
        tensor.numel() * dtypes[name].itemsize for name, tensor in stored.items() if tensor.dtype != dtypes[name]
    )
    free = available_memory()
    if free is not None and needed > free:
        raise EvlaError(
            f"casting this checkpoint needs {bytes_text(needed)} of memory, {bytes_text(free)} are free: load it in"
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


def _read_settings(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return this package's own object in config.json: `heads` by component and `pad_id`, both optional."""
    settings = config.get("evla_compile", {})
    if (
        not isinstance(settings, dict)
        or settings.keys() - {"heads", "pad_id"}
        or not isinstance(settings.get("heads", {}), dict)
    ):
        raise CheckpointError(
            'expected "evla_compile" to be an object like {"heads": {"dit": 12}, "pad_id": 32000}, both optional, found'
            f" {settings!r:.100}"
        )
    return settings


def _check_vocabulary(processor: Processor, vocabulary: int) -> None:
    """Refuse a tokenizer with other ids than the policy's, which would silently give other prompts."""
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
