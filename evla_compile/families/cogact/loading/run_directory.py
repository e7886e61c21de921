"""Find and read the files of a CogACT run directory, on disk or on the Hugging Face hub."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from types import MappingProxyType
from typing import Any

from huggingface_hub import snapshot_download

# The hub's client re-raises errors of its HTTP library, which differs between versions of the client.
from huggingface_hub.errors import HFValidationError, HTTPError  # type: ignore[attr-defined]

from evla_compile.errors import CheckpointError, UnsupportedModelError

TOKENIZER_REPOSITORY = "openvla/openvla-7b"
"""Hub repository whose ungated tokenizer.json is Llama-2's; CogACT's own repositories have none."""

_CONVERT = (
    "expected a .pt file of a CogACT training run, {'model': {group: {key: tensor}}}; convert its tensors to that with"
    " torch.save"
)
_OTHER_FORMATS = MappingProxyType(
    {
        ".safetensors": f"safetensors, as Hugging Face's models and OpenVLA's have them, are not read: {_CONVERT}",
        ".bin": f"the format of older models of Hugging Face is not read: {_CONVERT}",
    }
)
"""Advice for files of weights in other formats, by suffix."""
_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def find_checkpoint(path: str | Path) -> Path:
    """Return the .pt file of a run directory, of a path to the file itself, or of a Hugging Face id (downloaded).

    Raises:
        CheckpointError: there is no such file, or more than one.
    """
    # Made absolute but not resolved: the hub's cache links a checkpoint to a file elsewhere.
    local = Path(path).absolute()
    if local.is_dir():
        return _only_checkpoint(local)
    if local.is_file():
        if local.suffix in _OTHER_FORMATS:
            raise CheckpointError(f"{local}: {_OTHER_FORMATS[local.suffix]}")
        if local.suffix != ".pt" or local.parent.name != "checkpoints":
            raise CheckpointError(
                f"{local}: expected a .pt file in a folder named checkpoints, with config.json and"
                " dataset_statistics.json in that folder's parent; move the file or give the run directory"
            )
        return local
    repository = Path(path).as_posix()
    if local.suffix != ".pt" and _HUB_ID.fullmatch(repository):
        advice = "check the id, or download the repository elsewhere and give its folder"
        return _only_checkpoint(
            _download(
                repository, ["*.json", "checkpoints/*.pt"], advice, f"no such folder as {local}{_meant(local)}, and "
            )
        )
    raise CheckpointError(
        f"{local}: no such file or folder{_meant(local)}; expected a run directory, its checkpoints/*.pt, or a Hugging"
        " Face id like CogACT/CogACT-Base"
    )


def find_tokenizer(tokenizer: str | Path | None, run: Path) -> Path:
    """Return the tokenizer.json that was given (itself or its folder), else the run directory's, else the hub's.

    Raises:
        CheckpointError: there is none at the given path, or the hub cannot be reached.
    """
    if tokenizer is not None:
        given = Path(tokenizer)
        file = given / "tokenizer.json" if given.is_dir() else given
        if not file.is_file():
            raise CheckpointError(f"tokenizer={str(tokenizer)!r}: expected a tokenizer.json or its folder, found none")
        return file
    if (run / "tokenizer.json").is_file():
        return run / "tokenizer.json"
    advice = f"put Llama-2's tokenizer.json into {run}, or name it with the argument `tokenizer`"
    return _download(TOKENIZER_REPOSITORY, ["tokenizer.json"], advice) / "tokenizer.json"


def read_text(file: Path) -> str:
    """Return the text of a UTF-8 file.

    Raises:
        CheckpointError: the file is missing or is no UTF-8 text.
    """
    try:
        return file.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: expected this file of a CogACT run directory, found none") from error
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file}: expected UTF-8 text ({error}); copy or download it again") from error


def read_json(file: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        CheckpointError: the file is missing, is no JSON, or is no JSON object.
    """
    try:
        contents = json.loads(read_text(file))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: expected a JSON object ({error}); copy or download it again") from error
    if not isinstance(contents, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found a {type(contents).__name__}; download it again")
    return contents


@contextmanager
def naming(file: Path) -> Iterator[None]:
    """Prefix the message of an error within the block with the name of a file."""
    try:
        yield
    except (CheckpointError, UnsupportedModelError) as error:
        raise type(error)(f"{file}: {error}") from error


def _only_checkpoint(run: Path) -> Path:
    found = sorted(run.glob("checkpoints/*.pt"))
    if len(found) == 1:
        return found[0]
    names = f" ({', '.join(file.name for file in found)}); give the path of one" if found else _instead(run)
    raise CheckpointError(f"{run}: expected exactly one checkpoints/*.pt, found {len(found)}{names}")


def _instead(run: Path) -> str:
    """Return the file that was found instead of a checkpoint, with advice, as the end of a message."""
    others = [file for pattern in ("*", "checkpoints/*") for file in sorted(run.glob(pattern)) if file.is_file()]
    for suffix, advice in _OTHER_FORMATS.items():
        if names := [str(file.relative_to(run)) for file in others if file.suffix == suffix]:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return f", but {names[0]}{more}: {advice}"
    misplaced = [file.name for file in others if file.suffix == ".pt"]
    return f", but {', '.join(misplaced)} beside that folder; move it into checkpoints" if misplaced else ""


def _meant(missing: Path) -> str:
    """Return a question with the most similar name in the folder, for a missing path."""
    parent = missing.parent
    names = [entry.name for entry in parent.iterdir()] if parent.is_dir() else []
    close = get_close_matches(missing.name, names, n=1)
    return f" (is {parent / close[0]} meant?)" if close else ""


def _download(repository: str, patterns: Sequence[str], advice: str, otherwise: str = "") -> Path:
    try:
        return Path(snapshot_download(repository, allow_patterns=list(patterns)))
    except (OSError, HTTPError, HFValidationError) as error:
        raise CheckpointError(
            f"{repository}: {otherwise}cannot be downloaded from the Hugging Face hub ({error}); {advice}"
        ) from error
