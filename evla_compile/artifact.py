"""An artifact on disk: where its files lie, whether they are intact, and writing it whole or not at all; no torch.

A folder holds `model.onnx`, `manifest.json` and so on; a single-file export `X.onnx` or `X.engine` has
`X.manifest.json` and so on beside it. Of a policy in several parts, `model.onnx` becomes `model.perception.onnx` and so
on.
"""

import os
import secrets
import shutil
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from evla_compile.errors import ArtifactError
from evla_compile.manifest import FileRecord, read_manifest

ROOM_BYTES = 100_000_000
"""Bytes of disk that an artifact takes beside its weights: graph, tokenizer, recorded cases."""

_SINGLE_FILES = (".onnx", ".engine")
_OTHER_KINDS = (".plan", ".pt2", ".trt")
_ADVICE = "choose another --out or remove it"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactFiles:
    """Where an artifact's files lie."""

    target: Path
    """What was asked for: a folder, or an `X.onnx` or `X.engine` with the other files beside it."""
    folder: Path
    """The folder that holds every file."""
    model: str
    """Name of the ONNX file."""
    data: str
    """Name of its external data."""
    tokenizer: str
    """Name of the tokenizer."""
    report: str
    """Name of the compile report."""
    cases: str
    """Name of the recorded cases."""
    engine: str
    """Name of the TensorRT engine, if there is one."""
    manifest: str
    """Name of the manifest."""

    @classmethod
    def of(cls, target: str | os.PathLike[str]) -> Self:
        """Return the places for a target, which is a folder unless its name ends in `.onnx` or `.engine`."""
        path = Path(target)
        single = path.suffix in _SINGLE_FILES
        prefix, stem = (f"{path.stem}.", path.stem) if single else ("", "model")
        model = f"{stem}.onnx"
        folder = (path.parent if single else path).resolve()
        return cls(
            target=folder / path.name if single else folder,
            folder=folder,
            model=model,
            engine=f"{stem}.engine",
            data=f"{model}.data",
            tokenizer=f"{prefix}tokenizer.json",
            report=f"{prefix}report.json",
            cases=f"{prefix}cases.npz",
            manifest=f"{prefix}manifest.json",
        )


def part_name(name: str, part: str, parts: int) -> str:
    """Return the name of a part's file: `model.onnx` alone, or `model.perception.onnx` among several."""
    stem, _, suffix = name.rpartition(".")
    return name if parts == 1 else f"{stem}.{part}.{suffix}"


def find_manifest(path: str | os.PathLike[str]) -> Path:
    """Return the manifest that belongs to an artifact's folder, to its `.onnx` or `.engine`, or to the manifest itself.

    Raises:
        ArtifactError: there is none; the message says where it was expected.
    """
    given = Path(path)
    if given.name == "manifest.json" or given.name.endswith(".manifest.json"):
        places = [given]
    elif given.suffix in _SINGLE_FILES:
        places = [given.with_suffix(".manifest.json")]
        if given.stem == "model":
            places.append(given.with_name("manifest.json"))
    else:
        places = [given / "manifest.json"]
    for place in places:
        if place.is_file():
            return place
    raise ArtifactError(
        f"{given} is no compiled policy: expected its manifest at {' or '.join(map(str, places))}; give an artifact's"
        " folder, or an .onnx or .engine file with its manifest beside it"
    )


def check_files(records: Iterable[FileRecord], folder: Path, *, hashes: bool = True) -> None:
    """Check that files of an artifact are those that its manifest describes.

    Args:
        records: the files, all that the manifest lists or those that are going to be read.
        folder: where the files lie.
        hashes: whether to read every file through for its SHA-256; otherwise only presence and size are checked.

    Raises:
        ArtifactError: a file is missing, lies elsewhere through a link, or differs in size or hash.
    """
    for record in records:
        path = folder / record.name
        try:
            problem = _mismatch(record, path, hashes=hashes)
        except OSError as error:
            raise ArtifactError(f"{path} cannot be read: {error}") from error
        if problem:
            raise ArtifactError(
                f"{path} {problem}; copy the artifact again, or make it anew:"
                f" evla compile RUN_DIR --calibration FRAMES --out {folder}"
            )


@contextmanager
def writing(target: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty folder to write an artifact into, which takes its place only if the block succeeds.

    The files must carry the names of `ArtifactFiles.of(target)`, since a graph knows its external data by name. A
    former artifact is replaced; nothing else ever is. When anything fails, an interrupt included, all is as before.

    Args:
        target: an `X.onnx` or `X.engine` for files beside each other, anything else for a folder of its own.

    Raises:
        ArtifactError: the target exists and is not one of ours, or cannot be written: an `OSError` is its cause.
    """
    files = ArtifactFiles.of(target)
    with _beside(files) as new:
        yield new
        _move_into_place(new, files)


def check_target(target: str | os.PathLike[str]) -> None:
    """Refuse at once, before the work for it, a target that `writing` would refuse.

    Raises:
        ArtifactError: as for `writing`, or the target has the name of a file of another kind.
    """
    if Path(target).suffix in _OTHER_KINDS:
        raise ArtifactError(f"cannot write {target}: expected a name that ends in .onnx or .engine, or a folder")
    with _beside(ArtifactFiles.of(target)):
        pass


def check_space(target: str | os.PathLike[str], needed: int) -> None:
    """Refuse a target on a disk that has not `needed` bytes free; what is replaced stays until the new is whole.

    Raises:
        ArtifactError: the message says what is needed and what is free.
    """
    place = ArtifactFiles.of(target).target
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        left = [path.name for path in sorted(place.parent.glob(f".{place.name}.partial-*"))]
        raise ArtifactError(
            f"{target} needs {needed / 1e9:.1f} GB, and {place.parent} has {free / 1e9:.1f} GB free: make room, or"
            " choose another --out"
            + (f"; exports that were killed left {', '.join(left)}, which can be deleted" if left else "")
        )


@contextmanager
def _beside(files: ArtifactFiles) -> Iterator[Path]:
    """Yield an empty folder beside a target that may be written; it is gone afterwards, unless it has been moved."""
    try:
        _replaceable(
            files, (files.model, files.data, files.engine, files.tokenizer, files.report, files.cases, files.manifest)
        )
        with _scratch(files) as folder:
            yield folder
    except OSError as error:
        raise ArtifactError(
            f"{files.target} cannot be written: {error}; expected {files.target.parent} to be a writable folder with"
            " enough space: choose another --out"
        ) from error


def _mismatch(record: FileRecord, path: Path, *, hashes: bool) -> str | None:
    if not path.is_file():
        return "is missing"
    if path.resolve().parent != path.parent.resolve():
        return "is a link that leads out of the artifact"
    if path.stat().st_size != record.size:
        return f"has {path.stat().st_size} bytes, the manifest says {record.size}"
    if hashes:
        found = FileRecord.measure(path).sha256
        if found != record.sha256:
            return f"has the SHA-256 {found[:12]}..., the manifest says {record.sha256[:12]}..."
    return None


def _replaceable(files: ArtifactFiles, names: Iterable[str]) -> set[str]:
    """Return the names of the former artifact's files; refuse when anything else is in the place of `names`."""
    shared = files.folder != files.target
    if not shared and not files.folder.exists():
        return set()
    present = {path.name for path in files.folder.iterdir()}
    taken = present.intersection(names) if shared else present
    owned: set[str] = set()
    if files.manifest in taken:
        try:
            manifest = read_manifest(files.folder / files.manifest)
        except ArtifactError as error:
            raise ArtifactError(f"{files.target} exists and is not ours ({error}): {_ADVICE}") from error
        owned = {files.manifest, *(record.name for record in manifest.files)} & present
    foreign = sorted(taken - owned)
    if foreign:
        raise ArtifactError(
            f"{files.folder} holds {', '.join(foreign[:5])}, which no manifest of ours lists: {_ADVICE}"
        )
    return owned


@contextmanager
def _scratch(files: ArtifactFiles) -> Iterator[Path]:
    # Beside the target, so that moving is renaming. Not tempfile's mkdtemp: its mode 0700 would stay with the artifact.
    folder = files.target.with_name(f".{files.target.name}.partial-{secrets.token_hex(4)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        if folder.exists():
            shutil.rmtree(folder)


def _move_into_place(new: Path, files: ArtifactFiles) -> None:
    names = sorted((path.name for path in new.iterdir()), key=lambda name: (name == files.manifest, name))
    former = _replaceable(files, names)
    if not files.folder.exists():
        new.replace(files.folder)
        return
    with _scratch(files) as old, ExitStack() as undo:
        moves = [(files.folder / name, old / name) for name in sorted(former)]
        # The manifest goes last: without it, what is there is no artifact.
        moves += [(new / name, files.folder / name) for name in names]
        for source, destination in moves:
            source.replace(destination)
            undo.callback(destination.replace, source)
        undo.pop_all()
