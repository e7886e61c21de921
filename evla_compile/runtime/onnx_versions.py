"""Errors of ONNX Runtime, the opsets that its versions run, and advice for a file that it refuses."""

import re
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Any

from evla_compile.errors import EvlaError

OLDEST_RUNTIME: Mapping[int, tuple[int, int]] = MappingProxyType(
    {18: (1, 15), 19: (1, 16), 20: (1, 17), 21: (1, 18), 22: (1, 21), 23: (1, 23)}
)
"""Oldest ONNX Runtime, by opset, that ran an exported policy on a CPU; the next older one refused it. Measured with
1.15.1, 1.16.3, 1.17.3, 1.18.1, 1.19.2, 1.20.1, 1.21.1, 1.22.1, 1.23.2 and 1.32.0 on files of the IR versions that are
written."""


def import_onnxruntime(remedy: str) -> Any:
    """Return ONNX Runtime, an optional dependency, and one without type stubs.

    Args:
        remedy: the command that installs it.

    Raises:
        EvlaError: it cannot be imported.
    """
    try:
        return import_module("onnxruntime")
    except ImportError as error:
        raise EvlaError(f"ONNX Runtime cannot be imported ({error}): {remedy}") from error


def runtime_errors() -> tuple[type[Exception], ...]:
    """Return the exception classes of ONNX Runtime, which have no common base class."""
    names = vars(import_module("onnxruntime.capi.onnxruntime_pybind11_state")).values()
    return tuple(kind for kind in names if isinstance(kind, type) and issubclass(kind, Exception))


def refusal_advice(version: str, opset: int, package: str = "onnxruntime") -> str:
    """Return advice for a file that ONNX Runtime refuses.

    Args:
        version: that of ONNX Runtime.
        opset: that of the file.
        package: distribution that ONNX Runtime came with.
    """
    installed = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    needed = OLDEST_RUNTIME.get(opset, max(OLDEST_RUNTIME.values()))
    if installed >= needed:
        return (
            f"this version runs opset {opset}, so another opset would not help: the file is damaged, or holds operators"
            " or dtypes that the provider lacks; run evla verify where it was compiled, and copy or compile it again"
        )
    within = max((known for known, oldest in OLDEST_RUNTIME.items() if oldest <= installed), default=None)
    lower = "" if within is None else f", or export with opset={within} (evla compile --opset {within})"
    return f"opset {opset} needs {'.'.join(map(str, needed))} or newer: pip install --upgrade {package}{lower}"
