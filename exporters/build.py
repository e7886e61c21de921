"""Build the engines of an artifact on disk from its ONNX files, and record them in its manifest.

It runs on a robot: it imports the builder's library, and neither torch nor onnx.
"""

import os
import platform
import shutil
from dataclasses import replace
from pathlib import Path

from evla_compile.artifact.files import ArtifactFiles, check_files, find_manifest, finish_interrupted, writable
from evla_compile.artifact.integrity import mismatch
from evla_compile.artifact.journaled_move import put_in_place
from evla_compile.artifact.manifest import Manifest, read_manifest, write_manifest
from evla_compile.artifact.records import EngineRecord, FileRecord, Part
from evla_compile.errors import ArtifactError, EvlaError, ExportError
from evla_compile.exporters.to_tensorrt import check_memory, to_tensorrt
from evla_compile.scratch import exclusive, new_folder, scratch
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, EngineSettings, Flavour
from evla_compile.tensorrt.cuda import Gpu, find_gpu
from evla_compile.tensorrt.library import find_flavour, import_flavour
from evla_compile.units import bytes_text


def build_engine(
    path: str | os.PathLike[str], settings: EngineSettings | None = None, *, progress: bool = True
) -> Manifest:
    """Build the engines of an artifact beside its ONNX files and record them in its manifest, all or none.

    Engines that the manifest describes are replaced, other files never.

    Args:
        path: the artifact's folder, an `.onnx` file with its manifest beside it, or that manifest.
        settings: what to build for; None for the defaults of `EngineSettings`.
        progress: whether to draw a progress bar on standard error.

    Returns:
        The new manifest.

    Raises:
        ArtifactError: the artifact is missing or damaged, its folder cannot be written or is full, or a file that the
            manifest does not describe is in the place of an engine.
        EvlaError: the library is missing or too old, there is no GPU where one is needed, or memory is short.
        ExportError: the library refuses a graph; the message names the node.
        ValueError: the library does not have a setting.
    """
    settings = settings or EngineSettings()
    flavour, gpu = check_engine(settings)
    _finish_interrupted(Path(path))
    place = find_manifest(path)
    manifest = read_manifest(place)
    check_files([record for part in manifest.parts for record in part.files], place.parent)
    _former(manifest, place)
    for part in manifest.parts:
        check_memory(place.with_name(part.model.name), settings)
    _check_space(manifest, place)
    files = ArtifactFiles.at(place)
    with writable(files), scratch(files.folder / files.engine) as folder:
        new = new_folder(folder)
        engines = [new / _engine_name(part) for part in manifest.parts]
        layers = [
            _build_part(part, place.parent, engine, settings, progress=progress)
            for part, engine in zip(manifest.parts, engines, strict=True)
        ]
        record = EngineRecord(
            flavour=flavour,
            version=import_flavour(flavour).__version__,
            files=tuple(map(FileRecord.measure, engines)),
            layers=tuple(layers),
            platform=f"{platform.system()}-{platform.machine()}".lower(),
            gpu=None if gpu is None else gpu.name,
            gpu_processors=None if gpu is None else gpu.processors,
            gpu_memory_bytes=None if gpu is None else gpu.memory_bytes,
            compute_capabilities=settings.compute_capabilities if gpu is None else (gpu.compute_capability,),
            hardware_compatible=settings.hardware_compatible,
            version_compatible=settings.version_compatible,
        )
        described = replace(manifest, engine=record)
        write_manifest(described, new / place.name)
        with exclusive(files.folder):
            if read_manifest(place) != manifest:
                raise ArtifactError(f"{place} was replaced while engines were built for it: build them again")
            put_in_place(folder, files.folder, _former(manifest, place), place.name)
    return described


def check_engine(settings: EngineSettings) -> tuple[Flavour, Gpu | None]:
    """Refuse what `build_engine` would refuse of this machine, before any work is done.

    Returns:
        The flavour, and for TensorRT the GPU, which it builds for.

    Raises:
        EvlaError: the library is missing or too old, or there is no GPU where one is needed.
        ValueError: the library does not have a setting.
    """
    flavour = find_flavour(settings)
    import_flavour(flavour)
    if flavour == "tensorrt_rtx":
        return flavour, None
    gpu = find_gpu()
    if gpu is None:
        raise EvlaError(
            f"{FLAVOUR_NAMES[flavour]} builds engines on the GPU that is to run them, and this machine shows none: run"
            " evla build on the robot (evla doctor says what is missing), or build with TensorRT-RTX for RTX GPUs"
        )
    return flavour, gpu


def _finish_interrupted(path: Path) -> None:
    """Finish the moves that a killed export or build of the same artifact has begun."""
    place = path if path.name.endswith("manifest.json") else path / "manifest.json"
    known = [ArtifactFiles.at(place)] if path.suffix not in (".onnx", ".engine") else [ArtifactFiles.of(path)]
    if path.stem == "model":
        known.append(ArtifactFiles.of(path.parent))
    for files in known:
        finish_interrupted(files)


def _former(manifest: Manifest, place: Path) -> list[FileRecord]:
    """Return the files that new engines replace, and the manifest; refuse any other file in their place."""
    listed = {record.name: record for record in manifest.engine.files} if manifest.engine is not None else {}
    owned = [record for record in listed.values() if mismatch(record, place.with_name(record.name)) is None]
    names = {record.name for record in owned}
    for part in manifest.parts:
        engine = place.with_name(_engine_name(part))
        if os.path.lexists(engine) and engine.name not in names:
            raise ArtifactError(
                f"{engine} would be replaced, and is not the engine that {place.name} describes: move it elsewhere or"
                " remove it"
            )
    return [*owned, FileRecord.measure(place)]


def _engine_name(part: Part) -> str:
    return Path(part.model.name).with_suffix(".engine").name


def _build_part(part: Part, folder: Path, new: Path, settings: EngineSettings, *, progress: bool) -> int:
    built = to_tensorrt(folder / part.model.name, new, settings, progress=progress)
    for kind, found, wanted in (("takes", built.inputs, part.inputs), ("yields", built.outputs, part.outputs)):
        if sorted(found) != sorted(map(str, wanted)):
            raise ExportError(
                f"the network of {part.model.name} {kind} {', '.join(found)}: expected"
                f" {', '.join(map(str, wanted))} by the manifest; compile the policy again"
            )
    return built.layers


def _check_space(manifest: Manifest, place: Path) -> None:
    needed = sum(record.size for part in manifest.parts for record in part.files)
    free = shutil.disk_usage(place.parent).free
    if free < needed:
        raise ArtifactError(
            f"engines for {place.parent} take about {bytes_text(needed)}, and {bytes_text(free)} are free: make room"
        )
