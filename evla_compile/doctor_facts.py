"""What `evla doctor` looks at: versions, imports tried in processes of their own, GPU, memory and disk; no torch."""

import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from evla_compile.errors import EvlaError
from evla_compile.memory import available_memory
from evla_compile.runtime.cuda import Gpu, find_gpu

PACKAGES = (
    "torch",
    "torchvision",
    "transformers",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-openvino",
    "onnxruntime-directml",
    "tensorrt",
    "tensorrt-cu13",
    "tensorrt-cu12",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "numpy",
    "tokenizers",
    "Pillow",
)
"""Packages whose versions matter."""

PROGRAMS: Mapping[str, str] = {
    "torch": "import torch; found = {'version': torch.__version__, 'cuda': torch.version.cuda}",
    "transformers": (
        "import transformers; from transformers.models.llama.modeling_llama import LlamaDecoderLayer;"
        " found = {'version': transformers.__version__}"
    ),
    "onnxscript": "import onnx, onnxscript; found = {'version': onnxscript.__version__}",
    "onnxruntime": (
        "import onnxruntime; found = {'version': onnxruntime.__version__, 'providers':"
        " ' '.join(onnxruntime.get_available_providers())}"
    ),
    "tensorrt": "import tensorrt; found = {'version': tensorrt.__version__}",
    "tensorrt_rtx": "import tensorrt_rtx; found = {'version': tensorrt_rtx.__version__}",
}
"""What is imported to see whether it can be, by a name for it."""

_TIMEOUT = 180
_JETSON = Path("/etc/nv_tegra_release")


@dataclass(frozen=True, kw_only=True, slots=True)
class Import:
    """An import that was tried."""

    error: str | None = None
    """Last line of its error; None where it worked."""
    found: Mapping[str, str | None] | None = None
    """What it says of itself."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """What there is on this machine."""

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
    """Why it could not be looked for; None where it could."""
    memory: int | None
    """Bytes of memory that can be taken; None where the system does not tell."""
    disk: int
    """Bytes free on the disk in question."""


def collect(imports: Sequence[str], folder: Path) -> Facts:
    """Look at this machine.

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
        memory=available_memory(),
        disk=shutil.disk_usage(folder).free,
    )


def try_import(name: str) -> Import:
    """Import something in a process of its own, which a broken library may crash or hang."""
    program = f"import json\n{PROGRAMS[name]}\nprint(json.dumps(found))"
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
    if done.returncode:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        return Import(error=lines[-1] if lines else f"ended with exit status {done.returncode}")
    return Import(found=json.loads(done.stdout.splitlines()[-1]))


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
