"""Download artifacts from the Hugging Face hub by their id; no torch.

The hub's client is imported only for such an id: a robot that loads a folder needs none.
"""

import glob
import os
import re
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path

from evla_compile.artifact.manifest import Manifest, read_manifest
from evla_compile.artifact.records import FileRecord
from evla_compile.errors import ArtifactError, EvlaError

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
_LOCAL_SUFFIXES = (".onnx", ".engine", ".json")
_MANIFEST = "manifest.json"


def local_artifact(path: str | os.PathLike[str], wanted: Callable[[Manifest], Iterable[FileRecord]]) -> Path:
    """Return the path of an artifact on disk: the path itself, or for an id ORG/NAME the folder it is downloaded to.

    A path that exists is never looked up on the hub. Without a network, an earlier download is read from Hugging Face's
    cache, whose files are links.

    Args:
        path: a path, or the id of a repository with an artifact's folder.
        wanted: which of its files to download, by its manifest.

    Raises:
        ArtifactError: the repository cannot be downloaded, or is no artifact.
        EvlaError: the hub's client is not installed.
    """
    text = os.fspath(path)
    if os.path.lexists(text) or not _HUB_ID.fullmatch(text) or Path(text).suffix in _LOCAL_SUFFIXES:
        return Path(text)
    folder = _download(text, [_MANIFEST], None)
    if not (folder / _MANIFEST).is_file():
        raise ArtifactError(
            f"{text}: no such folder here, and the repository of that name on the Hugging Face hub has no {_MANIFEST}"
            " at its top, so it is no compiled policy; compile one: evla compile RUN_DIR --out DIR"
        )
    records = list(wanted(read_manifest(folder / _MANIFEST)))
    # The same revision for both downloads, even if the repository changes in between.
    revision = folder.name if re.fullmatch("[0-9a-f]{40}", folder.name) else None
    folder = _download(text, [_MANIFEST, *(glob.escape(record.name) for record in records)], revision)
    missing = [record.name for record in records if not (folder / record.name).is_file()]
    if missing:
        raise ArtifactError(
            f"{text}: {', '.join(missing)} of its manifest are not in {folder}: connect to the Hugging Face hub to"
            " download them, or ask who published the repository for the whole artifact"
        )
    return folder


def _download(repository: str, patterns: Sequence[str], revision: str | None) -> Path:
    try:
        hub = import_module("huggingface_hub")
        errors = import_module("huggingface_hub.errors")
    except ImportError as error:
        raise EvlaError(
            f"{repository}: no such folder here, and the Hugging Face hub cannot be asked ({error}): give an artifact's"
            " folder, or pip install huggingface_hub"
        ) from error
    try:
        return Path(hub.snapshot_download(repository, revision=revision, allow_patterns=list(patterns)))
    except (OSError, errors.HTTPError, errors.HFValidationError) as error:
        raise ArtifactError(
            f"{repository}: no such folder here, and it cannot be had from the Hugging Face hub ({error}); check the"
            " name and the network, or download the repository elsewhere and give its folder"
        ) from error
