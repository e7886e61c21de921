"""Facts for `evla doctor`: versions, imports tried in separate processes, GPU, memory and disk; no torch."""

import json
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from evla_compile.errors import EvlaError
from evla_compile.memory import available_memory
from evla_compile.runtime.providers import PROVIDERS
from evla_compile.tensorrt.cuda import Gpu, find_gpu

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch",),
    "transformers": ("transformers",),
    "onnxscript": ("onnx", "onnxscript"),
    "onnx": ("onnx",),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml"),
    "tensorrt": (
        "tensorrt",
        *(f"tensorrt-cu{major}{kind}" for major in (12, 13) for kind in ("", "-bindings", "-libs")),
    ),
    "tensorrt_rtx": (
        "tensorrt-rtx",
        *(f"tensorrt-rtx-cu{major}{kind}" for major in (12, 13) for kind in ("", "-bindings", "-libs")),
    ),
}
"""Packages that each of `PROGRAMS` needs."""

PACKAGES = (*sorted({name for names in DISTRIBUTIONS.values() for name in names}), "torchvision", "cuda-bindings")
"""Packages whose versions matter."""

# An ONNX file of one Identity operator, as bytes: a robot lacks the package that could write it.
_IDENTITY = (
    "08083a370a100a017812017922084964656e746974791201675a0f0a0178120a"
    "0a08080112040a020801620f0a0179120a0a08080112040a02080142021011"
)
_SESSION = (
    "import onnxruntime; session = onnxruntime.InferenceSession(bytes.fromhex('{model}'), providers=['{provider}'],"
    " enable_fallback=0); found = {{'taken': session.get_providers()[0]}}"
)

PROGRAMS: Mapping[str, str] = {
    "torch": "import torch; found = {'version': torch.__version__, 'cuda': torch.version.cuda}",
    "transformers": (
        "import transformers; from transformers.models.llama.modeling_llama import LlamaDecoderLayer;"
        " found = {'version': transformers.__version__}"
    ),
    "onnxscript": "import onnx, onnxscript; found = {'version': onnxscript.__version__}",
    "onnx": "import onnx; found = {'version': onnx.__version__}",
    "onnxruntime": (
        "import onnxruntime; found = {'version': onnxruntime.__version__, 'providers':"
        " ' '.join(onnxruntime.get_available_providers()), 'cuda': getattr(onnxruntime, 'cuda_version', '') or None}"
    ),
    "tensorrt": "import tensorrt; found = {'version': tensorrt.__version__}",
    "tensorrt_rtx": "import tensorrt_rtx; found = {'version': tensorrt_rtx.__version__}",
    # ONNX Runtime lists a provider even if its libraries cannot be loaded: only opening a session shows it.
    **{
        f"session-{key}": _SESSION.format(model=_IDENTITY, provider=provider.name)
        for key, provider in PROVIDERS.items()
    },
}
"""Python programs that test whether a library can be imported and works, by name."""

_TIMEOUT = 180
_JETSON = Path("/etc/nv_tegra_release")
_DRIVER = Path("/proc/driver/nvidia/version")
_MEMINFO = Path("/proc/meminfo")
_MISSING = re.compile(r"(\S+\.so\S*): cannot open shared object file")


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """Result of a tried import."""

    error: str | None = None
    """Last line of its error; None where it worked."""
    found: Mapping[str, str | None] | None = None
    """What the program printed, its version for instance; None where it failed."""
    missing: tuple[str, ...] = ()
    """Shared libraries that the loader did not find."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """Facts about this machine."""

    python: tuple[int, int]
    """Version of Python."""
    platform: str
    """Operating system and processor, such as `linux-x86_64`."""
    jetson: str | None
    """First line of the Jetson's release file; None elsewhere."""
    packages: Mapping[str, str]
    """Installed packages of `PACKAGES`, with their versions."""
    imports: Mapping[str, Import]
    """Imports that were tried, by the names of `PROGRAMS`."""
    gpu: Gpu | None
    """The first GPU."""
    gpu_error: str | None
    """Why the search for a GPU failed; None where it did not."""
    driver: str | None = None
    """Version of NVIDIA's kernel driver, such as `580.65.06`; None where none is loaded."""
    memory: int | None
    """Bytes of free memory; None where the system does not report it."""
    swap: int = 0
    """Bytes of swap that are free."""
    disk: int
    """Bytes free on the disk in question."""


def collect(imports: Sequence[str], folder: Path) -> Facts:
    """Collect the facts about this machine.

    Args:
        imports: names of `PROGRAMS` to try; a second or more each.
        folder: where files would be written.
    """
    gpu, gpu_error = None, None
    try:
        gpu = find_gpu()
    except EvlaError as error:
        gpu_error = str(error)
    return Facts(
        python=(sys.version_info.major, sys.version_info.minor),
        platform=f"{platform.system()}-{platform.machine()}".lower(),
        jetson=_JETSON.read_text(encoding="utf-8").splitlines()[0] if _JETSON.exists() else None,
        packages={name: metadata.version(name) for name in PACKAGES if _is_installed(name)},
        imports={name: try_import(name) for name in imports},
        gpu=gpu,
        gpu_error=gpu_error,
        driver=driver_version(_DRIVER.read_text(encoding="ascii")) if _DRIVER.exists() else None,
        memory=available_memory(),
        swap=free_swap(_MEMINFO.read_text(encoding="ascii")) if _MEMINFO.exists() else 0,
        disk=shutil.disk_usage(folder).free,
    )


def try_import(name: str) -> Import:
    """Run one of `PROGRAMS` in a separate process, since a broken library may crash or hang it."""
    program = f"import json\n{PROGRAMS[name]}\nprint(json.dumps(found, allow_nan=False))"
    try:
        done = subprocess.run(  # noqa: S603 (our own interpreter and program)
            [sys.executable, "-W", "ignore", "-c", program],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Import(error=f"still importing after {_TIMEOUT} s")
    missing = tuple(dict.fromkeys(_MISSING.findall(done.stderr)))
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Import(error=lines[-1] if lines else f"ended with exit status {done.returncode}", missing=missing)
    return Import(found=json.loads(done.stdout.splitlines()[-1]), missing=missing)


def driver_version(text: str) -> str | None:
    """Return the version in the text of /proc/driver/nvidia/version; None if there is none."""
    found = re.search(r"\b\d{3}\.\d+(?:\.\d+)?\b", text)
    return found.group() if found else None


def free_swap(text: str) -> int:
    """Return the bytes of free swap in /proc/meminfo's text."""
    found = re.search(r"^SwapFree:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found.group(1)) if found else 0


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
