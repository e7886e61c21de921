"""The checks of `evla doctor`: facts in, a finding out, each with its remedy; no torch."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from evla_compile.artifact import check_files
from evla_compile.doctor_facts import Facts
from evla_compile.engine_settings import FLAVOUR_NAMES, OLDEST_VERSIONS, Flavour
from evla_compile.errors import EvlaError
from evla_compile.manifest import Manifest
from evla_compile.runtime import Provider
from evla_compile.runtime.engine_match import check_match, require_engine
from evla_compile.tensorrt_library import REMEDIES

Work: TypeAlias = Literal["compile", "run", "build"]
"""What is going to be done here."""

Status: TypeAlias = Literal["ok", "warning", "failed"]
"""Outcome of a check; only a failed one stands in the way."""

BUILD_FACTOR, BUILD_BASE = 3.2, 700_000_000
"""Memory of an engine build: so many times the weights of its graph, and so many bytes beside."""

COMPILE_BYTES = 2_000_000_000
"""Memory that compiling and exporting takes beside the mapped checkpoint, whatever its size; 1.3 GB were measured."""

_NAME_IT = "name the policy: --artifact DIR, or --size base"
_TORCH = ((2, 11), (2, 16))
_RUNTIMES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_RUNTIME_OF = {"cpu": "onnxruntime", "cuda": "onnxruntime-gpu", "tensorrt": "onnxruntime-gpu"}
_EXECUTION = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """What is asked: whether some work can be done here."""

    work: Work
    """What."""
    provider: Provider = "cpu"
    """For `run`: where to compute."""
    flavour: Flavour = "tensorrt"
    """For `build`, and to run an engine: the library."""
    manifest: Manifest | None = None
    """The artifact in question, if there is one."""
    place: Path | None = None
    """Its manifest's file."""
    weight_bytes: int | None = None
    """Bytes of the weights in question, of the largest part for `build`; None if unknown."""

    @property
    def needs_gpu(self) -> bool:
        """Whether the work is done on a GPU of this machine."""
        if self.work == "build":
            return self.flavour == "tensorrt"
        return self.work == "run" and self.provider in ("cuda", "tensorrt", "engine")

    def describe(self) -> str:
        """Return what is asked, in words."""
        about = "policies" if self.place is None else str(self.place.parent)
        if self.work == "run":
            return f"run {about} " + ("as an engine" if self.provider == "engine" else f"on {self.provider}")
        if self.work == "build":
            return f"build an engine of {about} with {FLAVOUR_NAMES[self.flavour]}"
        return "compile policies"

    @property
    def imports(self) -> tuple[str, ...]:
        """What must be importable for it."""
        if self.work == "compile":
            return "torch", "transformers", "onnxscript", "onnxruntime"
        return (self.flavour,) if self.work == "build" or self.provider == "engine" else ("onnxruntime",)


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What one check found."""

    check: str
    """What was looked at."""
    status: Status
    """Whether it stands in the way."""
    found: str
    """What is there."""
    remedy: str | None = None
    """What to do: a command where one does it."""

    def to_json(self) -> dict[str, Any]:
        """Return the finding as JSON-ready values."""
        return asdict(self)


def check_python(facts: Facts) -> Finding:
    """Python 3.11 or newer."""
    version = ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        return _failed("Python", version, "install Python 3.11 or newer, and a virtual environment of it")
    return _ok("Python", f"{version}, {facts.platform}" + (f", {facts.jetson}" if facts.jetson else ""))


def check_torch(facts: Facts) -> Finding:
    """PyTorch imports, and is one of the versions that this package was written for."""
    tried = facts.imports["torch"]
    if tried.found is None:
        return _failed("PyTorch", tried.error or "not tried", "pip install torch==2.13.0")
    version, cuda = str(tried.found["version"]), tried.found.get("cuda")
    oldest, beyond = _TORCH
    if not oldest <= _numbers(version)[:2] < beyond:
        return _failed("PyTorch", f"{version}, expected 2.11 to 2.15", "pip install torch==2.13.0")
    return _ok("PyTorch", f"{version}, for {'CUDA ' + cuda if cuda else 'CPUs'}")


def check_transformers(facts: Facts) -> Finding:
    """Transformers' Llama imports, which a torchvision of another build than torch's prevents."""
    tried = facts.imports["transformers"]
    if tried.found is not None:
        return _ok("transformers", str(tried.found["version"]))
    if tried.error is not None and "torchvision" in tried.error:
        return _failed(
            "transformers",
            f"torchvision {facts.packages.get('torchvision')} is of another build than torch: {tried.error}",
            "pip uninstall torchvision (nothing here needs it)",
        )
    return _failed("transformers", tried.error or "not tried", 'pip install "transformers>=5,<6"')


def check_import(check: str, name: str, facts: Facts, remedy: str) -> Finding:
    """Something imports."""
    tried = facts.imports[name]
    if tried.found is None:
        return _failed(check, tried.error or "not tried", remedy)
    return _ok(check, f"{name} {tried.found['version']}")


def check_runtime_packages(request: Request, facts: Facts) -> Finding:
    """One flavour of ONNX Runtime: several overwrite each other's files, and the last one installed wins."""
    installed = [name for name in _RUNTIMES if name in facts.packages]
    wanted = _RUNTIME_OF.get(request.provider, "onnxruntime-openvino")
    if len(installed) > 1:
        return _failed(
            "ONNX Runtime's packages",
            f"{' and '.join(installed)} overwrite each other",
            f"pip uninstall -y {' '.join(installed)} && pip install {wanted}",
        )
    if not installed:
        return _failed("ONNX Runtime's packages", "none is installed", f"pip install {wanted}")
    return _ok("ONNX Runtime's packages", f"{installed[0]} {facts.packages[installed[0]]}")


def check_provider(request: Request, facts: Facts) -> Finding:
    """ONNX Runtime imports and offers the provider."""
    tried, wanted = facts.imports["onnxruntime"], _EXECUTION[request.provider]
    installed = [name for name in _RUNTIMES if name in facts.packages]
    package = _RUNTIME_OF.get(request.provider, "onnxruntime-openvino")
    remedy = (
        f"pip uninstall -y {' '.join(installed)} && pip install {package}" if installed else f"pip install {package}"
    )
    if tried.found is None:
        return _failed("ONNX Runtime", tried.error or "not tried", remedy)
    offered = str(tried.found["providers"])
    if wanted not in offered.split():
        return _failed("ONNX Runtime", f"{tried.found['version']} offers {offered}, not {wanted}", remedy)
    return _ok("ONNX Runtime", f"{tried.found['version']} offers {wanted}")


def check_tensorrt(request: Request, facts: Facts) -> Finding:
    """The flavour of TensorRT imports, is new enough, and is the one that an engine was built by."""
    name, tried, oldest = (
        FLAVOUR_NAMES[request.flavour],
        facts.imports[request.flavour],
        OLDEST_VERSIONS[request.flavour],
    )
    if tried.found is None:
        return _failed(name, tried.error or "not tried", REMEDIES[request.flavour])
    version = str(tried.found["version"])
    if _numbers(version)[:2] < oldest:
        return _failed(name, f"{version}, expected {oldest[0]}.{oldest[1]} or newer", REMEDIES[request.flavour])
    return _ok(name, version)


def check_gpu(facts: Facts) -> Finding:
    """There is a GPU, and it can be called."""
    if facts.gpu_error is not None:
        return _failed("GPU", facts.gpu_error, "pip install cuda-bindings")
    if facts.gpu is None:
        return _failed(
            "GPU", "the driver is missing, or shows no GPU", "install NVIDIA's driver until nvidia-smi lists the GPU"
        )
    gpu = facts.gpu
    return _ok("GPU", f"{gpu.name}, compute capability {gpu.compute_capability}, {gpu.memory_bytes / 1e9:.1f} GB")


def check_driver(facts: Facts) -> Finding:
    """The driver supports the CUDA that the library was built with."""
    if facts.gpu is None:
        raise ValueError("this check needs a GPU")
    supported, needed = _numbers(facts.gpu.driver_version), (12, 0)
    if "tensorrt-cu13" in facts.packages or "tensorrt-rtx-cu13" in facts.packages:
        needed = (13, 0)
    found = f"the driver supports CUDA {facts.gpu.driver_version}, {needed[0]}.{needed[1]} is needed"
    if supported[:1] < needed[:1]:
        return _failed(
            "CUDA driver", found, f"install a driver for CUDA {needed[0]}, or the packages for CUDA {supported[0]}"
        )
    return _ok("CUDA driver", found)


def check_memory(request: Request, facts: Facts) -> Finding:
    """The memory that the work takes is free: on the GPU for what runs there, else on the machine."""
    weights = request.weight_bytes
    on_gpu = request.needs_gpu and request.work == "run"
    if on_gpu and facts.gpu is None:
        return _warned("memory", "on the GPU that was not found", None)
    free = facts.gpu.memory_bytes if on_gpu and facts.gpu is not None else facts.memory
    where = "on the GPU" if on_gpu else "free"
    if request.work == "compile":
        needed, remedy = COMPILE_BYTES, "close other programs, or add swap"
    elif weights is None:
        return _warned("memory", f"{_gigabytes(free)} {where}; what is needed is unknown", _NAME_IT)
    elif request.work == "build":
        needed = round(BUILD_FACTOR * weights) + BUILD_BASE
        remedy = "export it in more parts (evla compile --parts), in half precision (--precision), or add swap"
    else:
        needed = weights
        remedy = (
            "evla run --mapped, or a smaller preset" if request.provider == "cpu" else "a smaller preset or --precision"
        )
    if free is None:
        return _warned("memory", f"{_gigabytes(needed)} are needed, and the system does not say what is free", None)
    found = f"{_gigabytes(needed)} are needed, {_gigabytes(free)} {where}"
    return _ok("memory", found) if needed <= free else _failed("memory", found, remedy)


def check_disk(request: Request, facts: Facts) -> Finding:
    """There is room for what is written."""
    if request.weight_bytes is None:
        return _warned("disk", f"{_gigabytes(facts.disk)} free; what is needed is unknown", _NAME_IT)
    needed = request.weight_bytes + 100_000_000
    found = f"{_gigabytes(needed)} are needed, {_gigabytes(facts.disk)} free"
    if needed > facts.disk:
        return _failed("disk", found, "make room, or choose a folder on another disk")
    return _ok("disk", found)


def check_artifact(request: Request) -> Finding:
    """The files that will be read are those that the manifest describes, byte by byte."""
    manifest, place = _known(request)
    engines = manifest.engine.files if manifest.engine is not None else ()
    if request.work == "run" and request.provider == "engine":
        files = (*engines, manifest.tokenizer)
    else:
        files = tuple(record for record in manifest.files if record not in engines)
    try:
        check_files(files, place.parent)
    except EvlaError as error:
        return _failed("artifact", str(error), "copy the artifact again")
    return _ok("artifact", f"{len(files)} files as the manifest says")


def check_engine(request: Request, facts: Facts) -> Finding:
    """The engine is for this GPU, library and platform."""
    manifest, place = _known(request)
    tried = facts.imports[request.flavour]
    version = str(tried.found["version"]) if tried.found is not None else "none"
    try:
        check_match(require_engine(manifest, place), version, facts.gpu, place)
    except EvlaError as error:
        return _failed("engine", str(error), f"evla build {place.parent} --flavour {request.flavour}")
    return _ok("engine", "for this GPU, library and platform")


def _known(request: Request) -> tuple[Manifest, Path]:
    if request.manifest is None or request.place is None:
        raise ValueError("this check needs an artifact")
    return request.manifest, request.place


def _numbers(version: str) -> tuple[int, ...]:
    parts = version.split("+", maxsplit=1)[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _gigabytes(count: int | None) -> str:
    return "an unknown amount" if count is None else f"{count / 1e9:.1f} GB"


def _ok(check: str, found: str) -> Finding:
    return Finding(check=check, status="ok", found=found)


def _warned(check: str, found: str, remedy: str | None) -> Finding:
    return Finding(check=check, status="warning", found=found, remedy=remedy)


def _failed(check: str, found: str, remedy: str) -> Finding:
    return Finding(check=check, status="failed", found=found, remedy=remedy)
