"""An artifact on disk: where its files are, whether they are intact, and how it is written as a whole; no torch.

A folder has `model.onnx`, `manifest.json` and so on; a single-file export `X.onnx` or `X.engine` has
`X.manifest.json` and so on beside it. Of a policy in several parts, `model.onnx` becomes `model.perception.onnx` and so
on.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Self, TypeAlias

from evla_compile.artifact.integrity import mismatch
from evla_compile.artifact.journaled_move import finish, put_in_place
from evla_compile.artifact.manifest import read_manifest
from evla_compile.artifact.records import FileRecord
from evla_compile.errors import ArtifactError
from evla_compile.scratch import JOURNAL, exclusive, new_folder, partials, remove_stale, scratch
from evla_compile.units import bytes_text

ROOM_BYTES = 100_000_000
"""Bytes of disk that an artifact takes beside its weights: graph, tokenizer, recorded cases."""

_SINGLE_FILES = (".onnx", ".engine")
_OTHER_KINDS = (".plan", ".pt2", ".trt")
_Version: TypeAlias = tuple[int, ...]
_NOTHING: Mapping[str, _Version] = MappingProxyType({})
_ADVICE = "choose another --out or remove it"


@dataclass(frozen=True, kw_only=True, slots=True)
class ArtifactFiles:
    """Paths and names of an artifact's files."""

    target: Path
    """What was asked for: a folder, or an `X.onnx` or `X.engine` with the other files beside it."""
    folder: Path
    """The folder of all files."""
    model: str
    """Name of the ONNX file."""
    data: str
    """Name of its external data."""
    tokenizer: str
    """Name of the tokenizer."""
    report: str
    """Name of the compile report."""
    tensors: str
    """Name of the plan's tensors, if it has any."""
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
        if path.suffix in _SINGLE_FILES:
            folder = path.parent.resolve()
            return cls._named(folder / path.name, folder, path.stem)
        return cls._named(path.resolve(), path.resolve(), None)

    @classmethod
    def at(cls, manifest: Path) -> Self:
        """Return the places of the artifact that a manifest belongs to."""
        folder = manifest.parent.resolve()
        if manifest.name == "manifest.json":
            return cls._named(folder, folder, None)
        stem = manifest.name.removesuffix(".manifest.json")
        return cls._named(folder / f"{stem}.onnx", folder, stem)

    @classmethod
    def _named(cls, target: Path, folder: Path, single: str | None) -> Self:
        prefix, stem = ("", "model") if single is None else (f"{single}.", single)
        model = f"{stem}.onnx"
        return cls(
            target=target,
            folder=folder,
            model=model,
            engine=f"{stem}.engine",
            data=f"{model}.data",
            tokenizer=f"{prefix}tokenizer.json",
            report=f"{prefix}report.json",
            tensors=f"{prefix}plan.safetensors",
            cases=f"{prefix}cases.npz",
            manifest=f"{prefix}manifest.json",
        )

    @property
    def beside_others(self) -> bool:
        """Whether the folder may contain other files too: that of a single-file export may."""
        return self.folder != self.target

    @property
    def places(self) -> tuple[Path, ...]:
        """Paths beside which an export or a build creates its scratch folder."""
        whole = self.folder / self.model if self.beside_others else self.folder
        return (whole, self.folder / self.engine)


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
    for place in places:
        if any((folder / JOURNAL).exists() for beside in ArtifactFiles.at(place).places for folder in partials(beside)):
            raise ArtifactError(
                f"{given} is incomplete: an export was killed, or is at work, while its files were moved into place;"
                " export or build there again, which finishes that first"
            )
    raise ArtifactError(
        f"{given} is no compiled policy: expected its manifest at {' or '.join(map(str, places))}; give an artifact's"
        " folder, or an .onnx or .engine file with its manifest beside it"
    )


def check_files(records: Iterable[FileRecord], folder: Path, *, hashes: bool = True) -> None:
    """Check that files of an artifact are those that its manifest describes.

    Args:
        records: the files, all that the manifest lists or those that are going to be read.
        folder: folder of the files.
        hashes: whether to read every file through for its SHA-256; otherwise only presence and size are checked.

    Raises:
        ArtifactError: a file is missing or differs in size or hash, what a link leads to included.
    """
    for record in records:
        path = folder / record.name
        try:
            problem = mismatch(record, path, hashes=hashes)
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

    The files must have the names of `ArtifactFiles.of(target)`, since a graph refers to its external data by name. An
    earlier artifact is replaced, and nothing else: its files are those whose hash is in its manifest. When anything
    fails, an interrupt or SIGTERM included, all is as before. If the process is killed, the next export or build at
    this place finishes the moves it had begun, and removes what it left.

    Args:
        target: an `X.onnx` or `X.engine` for files beside each other, anything else for a folder.

    Raises:
        ArtifactError: the target exists and is not one of ours, or cannot be written: an `OSError` is its cause.
    """
    files = ArtifactFiles.of(target)
    with writable(files):
        finish_interrupted(files)
        known = _refuse_foreign(files, hashes=True)
        with scratch(files.target) as folder:
            yield new_folder(folder)
            _move_into_place(folder, files, known)


def check_target(target: str | os.PathLike[str]) -> None:
    """Refuse what `writing` would refuse of a target, hashes aside, before any work is done.

    Raises:
        ArtifactError: as for `writing`, or the target has the name of a file of another kind.
    """
    if Path(target).suffix in _OTHER_KINDS:
        raise ArtifactError(f"cannot write {target}: expected a name that ends in .onnx or .engine, or a folder")
    files = ArtifactFiles.of(target)
    with writable(files):
        finish_interrupted(files)
        _refuse_foreign(files, hashes=False)
        with scratch(files.target):
            pass


def check_space(target: str | os.PathLike[str], needed: int) -> None:
    """Refuse a target on a disk with less than `needed` bytes free; files to be replaced stay until the end.

    Raises:
        ArtifactError: the message says what is needed and what is free.
    """
    place = ArtifactFiles.of(target).target
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        others = [path.name for path in partials(place)]
        raise ArtifactError(
            f"{target} needs {bytes_text(needed)}, and {place.parent} has {bytes_text(free)} free: make room, or"
            " choose another --out" + (f"; other exports to it are writing {', '.join(others)}" if others else "")
        )


def finish_interrupted(files: ArtifactFiles) -> None:
    """Finish the moves that a killed export or build has begun, and remove what it left.

    Raises:
        ArtifactError: another file is in the way by now.
    """
    for place in files.places:
        remove_stale(place, partial(finish, destination=files.folder))


@contextmanager
def writable(files: ArtifactFiles) -> Iterator[None]:
    """Turn an OSError within this block into an ArtifactError that says what to do."""
    try:
        yield
    except OSError as error:
        raise ArtifactError(
            f"{files.target} cannot be written: {error}; expected {files.target.parent} to be a writable folder with"
            " enough space: choose another --out"
        ) from error


def _names(files: ArtifactFiles) -> tuple[str, ...]:
    graphs = (files.model, files.data, files.engine)
    return (*graphs, files.tokenizer, files.report, files.tensors, files.cases, files.manifest)


def _refuse_foreign(files: ArtifactFiles, *, hashes: bool) -> dict[str, _Version]:
    """Refuse files of other origin, under the lock; return the versions of the earlier artifact's files."""
    if not files.folder.exists() and not files.beside_others:
        return {}
    with exclusive(files.folder):
        former = _former(files, _names(files), hashes=hashes)
        return {record.name: _version(files.folder / record.name) for record in former}


def _former(
    files: ArtifactFiles, names: Iterable[str], known: Mapping[str, _Version] = _NOTHING, *, hashes: bool = True
) -> tuple[FileRecord, ...]:
    """Return the earlier artifact's files, its manifest among them; refuse any other file in the place of `names`.

    Where the artifact is a folder, every other file in it is refused.

    Args:
        files: the places.
        names: what is going to be written.
        known: versions of files that have been found to be ours before, and are not read again.
        hashes: whether to read files through; otherwise only their sizes are compared.
    """
    present = {path.name for path in files.folder.iterdir()}
    taken = present.intersection(names) if files.beside_others else present
    owned: list[FileRecord] = []
    listed: dict[str, FileRecord] = {}
    if files.manifest in present:
        try:
            manifest = read_manifest(files.folder / files.manifest)
        except ArtifactError as error:
            raise ArtifactError(f"{files.target} exists and is not ours ({error}): {_ADVICE}") from error
        prefix = files.manifest.removesuffix("manifest.json")
        listed = {record.name: record for record in manifest.files if record.name.startswith(prefix)}
        for name in sorted(listed.keys() & present):
            path = files.folder / name
            if mismatch(listed[name], path, hashes=hashes and known.get(name) != _version(path)) is None:
                owned.append(listed[name])
        owned.append(FileRecord.measure(files.folder / files.manifest))
    foreign = sorted(taken - {record.name for record in owned})
    if foreign:
        why = "differs from what its manifest describes" if foreign[0] in listed else "no manifest of ours lists"
        raise ArtifactError(f"{files.folder} holds {', '.join(foreign[:5])}, which {why}: {_ADVICE}")
    return tuple(owned)


def _version(path: Path) -> _Version:
    """Return values of which one changes whenever the file does."""
    stat = path.stat()
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def _move_into_place(folder: Path, files: ArtifactFiles, known: Mapping[str, _Version]) -> None:
    new = new_folder(folder)
    if not files.folder.exists():
        try:
            new.replace(files.folder)
        except OSError:
            if not files.folder.exists():
                raise
        else:
            return  # otherwise another export came first
    with exclusive(files.folder):
        former = _former(files, [path.name for path in new.iterdir()], known)
        put_in_place(folder, files.folder, former, files.manifest)
