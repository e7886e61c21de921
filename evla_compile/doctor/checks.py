"""The checks of `evla doctor` on installed software: from facts to a finding with its remedy; no torch."""

import re

from evla_compile.doctor.facts import DISTRIBUTIONS, Facts
from evla_compile.doctor.request import Finding, Request, failed, ok, warned
from evla_compile.runtime.providers import PROVIDERS, ExecutionProvider
from evla_compile.runtime.widening import REMEDY
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, OLDEST_VERSIONS, Flavour
from evla_compile.tensorrt.library import REMEDIES
from evla_compile.units import bytes_text

_TORCH = ((2, 11), (2, 16))
_CPU_TORCH = "pip install torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
_RUNTIMES = DISTRIBUTIONS["onnxruntime"]
_NVIDIA_INDEX = "--extra-index-url https://pypi.nvidia.com"
_CUDA_13_DRIVER = 580
"""Oldest release of NVIDIA's driver for CUDA 13."""


def check_python(facts: Facts) -> Finding:
    """Check for Python 3.11 or newer."""
    version = ".".join(map(str, facts.python))
    if facts.python < (3, 11):
        return failed("Python", version, "install Python 3.11 or newer, and a virtual environment of it")
    return ok("Python", f"{version}, {facts.platform}" + (f", {facts.jetson}" if facts.jetson else ""))


def check_torch(facts: Facts) -> Finding:
    """Check that PyTorch imports, has a supported version, and fits the driver if there is one.

    A driver too old for it is a warning: compiling and exporting need no GPU.
    """
    tried = facts.imports["torch"]
    if tried.found is None:
        return failed("PyTorch", tried.error or "not tried", "pip install torch==2.13.0")
    version, cuda = str(tried.found["version"]), tried.found.get("cuda")
    oldest, beyond = _TORCH
    if not oldest <= numbers(version)[:2] < beyond:
        return failed("PyTorch", f"{version}, expected 2.11 to 2.15", "pip install torch==2.13.0")
    if cuda and facts.gpu is not None and numbers(facts.gpu.driver_version)[0] < numbers(cuda)[0]:
        found = (
            f"{version} is for CUDA {cuda}, the driver supports {facts.gpu.driver_version}: it runs on the CPU alone"
        )
        return warned("PyTorch", found, f"install a driver for CUDA {numbers(cuda)[0]}, or {_CPU_TORCH}")
    return ok("PyTorch", f"{version}, for {'CUDA ' + cuda if cuda else 'CPUs'}")


def check_transformers(facts: Facts) -> Finding:
    """Check that transformers' Llama imports; a torchvision built for another torch prevents that."""
    tried = facts.imports["transformers"]
    if tried.found is not None:
        return ok("transformers", str(tried.found["version"]))
    if tried.error is not None and "torchvision" in tried.error and "torchvision" in facts.packages:
        return failed(
            "transformers",
            f"torchvision {facts.packages['torchvision']}, which nothing here needs, is of another build than torch:"
            f" {tried.error}",
            "pip uninstall -y torchvision",
        )
    return failed("transformers", tried.error or "not tried", 'pip install "transformers>=5,<6"')


def check_export(facts: Facts) -> Finding:
    """Check that the packages import that write ONNX files."""
    tried = facts.imports["onnxscript"]
    if tried.found is None:
        return failed("ONNX export", tried.error or "not tried", "pip install onnx onnx_ir onnxscript")
    return ok("ONNX export", f"onnxscript {tried.found['version']}")


def check_runtime_packages(request: Request, facts: Facts) -> Finding:
    """Check that one package of ONNX Runtime is installed: several overwrite each other's files."""
    installed = [name for name in _RUNTIMES if name in facts.packages]
    if len(installed) > 1:
        return failed(
            "ONNX Runtime's packages", f"{' and '.join(installed)} overwrite each other", _install(request, facts)
        )
    if not installed:
        return failed("ONNX Runtime's packages", "none is installed", _install(request, facts))
    return ok("ONNX Runtime's packages", f"{installed[0]} {facts.packages[installed[0]]}")


def check_provider(request: Request, facts: Facts) -> Finding:
    """Check that ONNX Runtime imports, offers the provider, and opens a session on it, which loads its libraries."""
    tried, session = facts.imports["onnxruntime"], facts.imports[f"session-{request.provider}"]
    wanted = _execution_provider(request).name
    if tried.found is None:
        return failed("ONNX Runtime", tried.error or "not tried", _install(request, facts))
    version, offered = tried.found["version"], str(tried.found["providers"])
    if wanted not in offered.split():
        return failed("ONNX Runtime", f"{version} offers {offered}, not {wanted}", _install(request, facts))
    if session.found is None or session.found["taken"] != wanted:
        reason = f"{', '.join(session.missing)} not found" if session.missing else session.error or "it says not why"
        return failed(
            "ONNX Runtime",
            f"{version} offers {wanted}, which does not load: {reason}",
            _libraries(request, tried.found.get("cuda")),
        )
    return ok("ONNX Runtime", f"{version} computes on {wanted}")


def check_widening(facts: Facts) -> Finding:
    """Check that onnx imports, which rewrites a bfloat16 policy to float32 arithmetic on a CPU."""
    tried = facts.imports["onnx"]
    if tried.found is None:
        found = f"it runs in float32 arithmetic on a CPU, for which onnx rewrites it: {tried.error or 'not tried'}"
        return failed("bfloat16", found, REMEDY)
    found = "it runs in float32 arithmetic on a CPU, in twice the memory of its weights"
    return warned("bfloat16", found, "evla build, for bfloat16 on a GPU; or evla compile --precision float32")


def check_tensorrt(flavour: Flavour, facts: Facts) -> Finding:
    """Check that the flavour of TensorRT imports, and is new enough."""
    name, tried, oldest = FLAVOUR_NAMES[flavour], facts.imports[flavour], OLDEST_VERSIONS[flavour]
    if tried.found is None:
        return failed(name, _why_absent(flavour, facts), _mend_tensorrt(flavour, facts))
    version = str(tried.found["version"])
    if numbers(version)[:2] < oldest:
        found = f"{version}, expected {oldest[0]}.{oldest[1]} or newer"
        return failed(name, found, REMEDIES[flavour])
    return ok(name, version)


def check_gpu(request: Request, facts: Facts) -> Finding:
    """Check that there is a GPU which Python can call; ONNX Runtime calls it without Python."""
    if facts.gpu is not None:
        gpu = facts.gpu
        return ok("GPU", f"{gpu.name}, compute capability {gpu.compute_capability}, {bytes_text(gpu.memory_bytes)}")
    cuda = None if facts.driver is None else 13 if numbers(facts.driver)[0] >= _CUDA_13_DRIVER else 12
    bindings = facts.packages.get("cuda-bindings")
    if facts.gpu_error is not None:
        package = "cuda-bindings" if cuda is None else f'"cuda-bindings=={cuda}.*"'
        remedy = "nvidia-smi says why" if bindings else f"pip install {package}"
        if request.provider in ("cuda", "tensorrt"):
            return warned("GPU", f"which one is unknown: {facts.gpu_error}", remedy)
        return failed("GPU", facts.gpu_error, remedy)
    if cuda is not None and bindings is not None and numbers(bindings)[0] > cuda:
        found = f"the driver {facts.driver} is for CUDA {cuda}, and cuda-bindings {bindings} calls a newer one"
        return failed("GPU", found, f'pip install "cuda-bindings=={cuda}.*"')
    if cuda is not None:
        found = f"the driver {facts.driver} shows no GPU"
        return failed("GPU", found, "nvidia-smi says why; a container is started with docker run --gpus all")
    return failed("GPU", "no driver of NVIDIA's is loaded", "install NVIDIA's driver until nvidia-smi lists the GPU")


def check_driver(request: Request, facts: Facts) -> Finding:
    """Check that the driver supports the major version of CUDA that the library was built with.

    Raises:
        ValueError: there is no GPU.
    """
    if facts.gpu is None:
        raise ValueError("this check needs a GPU")
    supported, (user, needed) = facts.gpu.driver_version, _cuda_of(request, facts)
    if needed is None:
        return ok("CUDA driver", f"supports CUDA {supported}; {user} does not say which it needs")
    found = f"supports CUDA {supported}, {user} needs {needed}"
    if numbers(supported)[0] < numbers(needed)[0]:
        return failed(
            "CUDA driver", found, f"install a driver for CUDA {numbers(needed)[0]}: {_CUDA_13_DRIVER} or newer"
        )
    return ok("CUDA driver", found)


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with: `2.13.0+cpu` -> (2, 13, 0)."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found.group().split("."))) if found else (0,)


def _execution_provider(request: Request) -> ExecutionProvider:
    """Return the provider of ONNX Runtime for a request; compiling verifies on the CPU."""
    return PROVIDERS["cpu" if request.provider == "engine" else request.provider]


def _cuda_of(request: Request, facts: Facts) -> tuple[str, str | None]:
    """Return the library that calls CUDA, and the CUDA version that it was built with, None if unknown."""
    if request.provider in ("cuda", "tensorrt"):
        tried = facts.imports["onnxruntime"]
        return "onnxruntime-gpu", tried.found.get("cuda") if tried.found is not None else None
    for name in DISTRIBUTIONS[request.flavour]:
        major = re.search(r"-cu(\d+)", name)
        if name in facts.packages and major is not None:
            return name, f"{major.group(1)}.0"
    return FLAVOUR_NAMES[request.flavour], None


def _install(request: Request, facts: Facts) -> str:
    """Return the command after which exactly the ONNX Runtime that is needed is installed."""
    installed = [name for name in _RUNTIMES if name in facts.packages]
    wanted = _execution_provider(request).package
    removal = f"pip uninstall -y {' '.join(installed)} && " if installed else ""
    return f"{removal}pip install {wanted}"


def _libraries(request: Request, cuda: str | None) -> str:
    """Return the remedy for libraries that a provider could not load."""
    if request.provider not in ("cuda", "tensorrt"):
        return f"pip install --force-reinstall {_execution_provider(request).package}"
    names = f"CUDA {numbers(cuda)[0]}" if cuda is not None else "CUDA"
    names += ", cuDNN 9 and TensorRT 10" if request.provider == "tensorrt" else " and cuDNN 9"
    return f"install {names} from NVIDIA's apt or dnf repository, or add their folders to LD_LIBRARY_PATH"


def _why_absent(flavour: Flavour, facts: Facts) -> str:
    installed = [f"{name} {facts.packages[name]}" for name in DISTRIBUTIONS[flavour] if name in facts.packages]
    error = facts.imports[flavour].error or "not tried"
    return f"{', '.join(installed)}: installed, and does not import: {error}" if installed else error


def _mend_tensorrt(flavour: Flavour, facts: Facts) -> str:
    """Return the command that installs a flavour, or repairs an installation without its libraries.

    On PyPI the package of TensorRT's libraries is a stub that downloads them from NVIDIA, and this may fail silently.
    """
    if facts.jetson is not None and flavour == "tensorrt":
        return (
            "sudo apt install python3-libnvinfer, and python3 -m venv --system-site-packages: see docs/how-to/jetson.md"
        )
    installed = [name for name in DISTRIBUTIONS[flavour] if name in facts.packages]
    if not installed:
        return REMEDIES[flavour]
    if flavour == "tensorrt_rtx":
        return f"pip uninstall -y {' '.join(installed)} && {REMEDIES[flavour]}"
    major = "12" if any("cu12" in name for name in installed) else "13"
    return f"pip uninstall -y {' '.join(installed)} && pip install {_NVIDIA_INDEX} tensorrt-cu{major}"
