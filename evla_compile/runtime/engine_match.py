"""Check whether the engines of an artifact run on this machine, and name the command that rebuilds them; no torch."""

import platform
import re
import shlex
from pathlib import Path

from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.records import EngineRecord
from evla_compile.errors import ArtifactError, EvlaError
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, RTX_CAPABILITIES, Flavour
from evla_compile.tensorrt.cuda import Gpu
from evla_compile.units import bytes_text

_ALSO_RUNS = {10: 11}
"""Major version of TensorRT -> later major version that also runs its version-compatible engines, by NVIDIA's support
matrix; other engines run on their own major version alone."""

_MEMORY_TOLERANCE = 0.2
"""Share by which the memory of two GPUs of one kind may differ: a Jetson's firmware reserves some of it."""


def require_engine(manifest: Manifest, place: Path) -> EngineRecord:
    """Return the record of an artifact's engines.

    Raises:
        ArtifactError: there are none.
    """
    if manifest.engine is None:
        raise ArtifactError(f"{place.parent} holds no engine: build it, evla build {_target(place)}")
    return manifest.engine


def check_match(record: EngineRecord, version: str, gpu: Gpu | None, place: Path) -> None:
    """Refuse engines that were built for another library version, platform or GPU.

    Args:
        record: record of the engines, from the manifest.
        version: version of the library that is installed.
        gpu: the GPU; None where there is none.
        place: the artifact's manifest, for the message.

    Raises:
        ArtifactError: they are for another version, platform or GPU; the message has the command that builds them.
        EvlaError: there is no GPU.
    """
    name, here = FLAVOUR_NAMES[record.flavour], f"{platform.system()}-{platform.machine()}".lower()
    if not _runs_version(record, version):
        raise ArtifactError(
            f"the engine in {place.parent} was built by {name} {record.version}, and {version} is installed;"
            f" {rebuild(record, place)}, or install {name} {record.version}"
        )
    if here != record.platform:
        raise ArtifactError(
            f"the engine in {place.parent} was built for {record.platform}, and this is {here};"
            f" {rebuild(record, place)}"
        )
    if gpu is None:
        raise EvlaError(
            f"{name} runs engines on a GPU, and this machine shows none: see evla doctor, or run the ONNX file on the"
            " CPU (provider='cpu')"
        )
    if not _runs_gpu(record, gpu):
        capabilities = ", ".join(record.compute_capabilities or RTX_CAPABILITIES)
        built_for = f"{record.gpu or 'GPUs'} of compute capability {capabilities}"
        size = ""
        if record.gpu_processors is not None and record.gpu_memory_bytes is not None:
            built_for += _size(record.gpu_processors, record.gpu_memory_bytes)
            size = _size(gpu.processors, gpu.memory_bytes)
        raise ArtifactError(
            f"the engine in {place.parent} was built for {built_for}, and this is {gpu.name}, {gpu.compute_capability}"
            f"{size}; {rebuild(record, place, gpu)}{_power_mode(record, gpu)}"
        )


def rebuild(record: EngineRecord, place: Path, gpu: Gpu | None = None) -> str:
    """Return advice with the command that rebuilds the engines for this machine."""
    return f"build it for this machine: {build_command(record.flavour, place, gpu)}"


def build_command(flavour: Flavour, place: Path, gpu: Gpu | None = None) -> str:
    """Return the command that builds an artifact's engines.

    Args:
        flavour: the library to build with.
        place: the artifact's manifest.
        gpu: what is to run them; None where that is not known.
    """
    capability = f" --capability {gpu.compute_capability}" if gpu is not None and flavour == "tensorrt_rtx" else ""
    return f"evla build {_target(place)} --flavour {flavour}{capability}"


def _target(place: Path) -> str:
    """Return the artifact's path as an argument for a shell."""
    return shlex.quote(str(place.parent if place.name == "manifest.json" else place))


def _runs_version(record: EngineRecord, version: str) -> bool:
    if not record.version_compatible:
        return version == record.version
    built, here = ([int(number) for number in re.findall(r"\d+", text)] for text in (record.version, version))
    return here >= built and here[0] in (built[0], _ALSO_RUNS.get(built[0]))


def _runs_gpu(record: EngineRecord, gpu: Gpu) -> bool:
    if record.flavour == "tensorrt_rtx":
        return gpu.compute_capability in (record.compute_capabilities or RTX_CAPABILITIES)
    if record.hardware_compatible:
        return tuple(map(int, gpu.compute_capability.split("."))) >= (8, 0)
    return (
        gpu.compute_capability in record.compute_capabilities
        and gpu.name == record.gpu
        and gpu.processors == record.gpu_processors
        and abs(gpu.memory_bytes - (record.gpu_memory_bytes or 0)) <= _MEMORY_TOLERANCE * gpu.memory_bytes
    )


def _size(processors: int, memory_bytes: int) -> str:
    """Return the properties by which GPUs of one name differ, as a phrase."""
    return f" with {processors} multiprocessors and {bytes_text(memory_bytes)}"


def _power_mode(record: EngineRecord, gpu: Gpu) -> str:
    """Return a hint for a Jetson of the same kind, whose power mode changes the number of multiprocessors."""
    alike = gpu.name == record.gpu and gpu.compute_capability in record.compute_capabilities
    if not alike or not record.platform.endswith("aarch64"):
        return ""
    return "; on a Jetson, in the power mode that it runs in (nvpmodel turns multiprocessors off)"
