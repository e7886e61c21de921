"""One interface to TensorRT and TensorRT-RTX: find the one installed, import it, keep its log; no torch, no onnx."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from importlib import import_module
from types import MappingProxyType
from typing import Any

from evla_compile.errors import EvlaError
from evla_compile.settings.engine_settings import FLAVOUR_NAMES, FLAVOURS, OLDEST_VERSIONS, EngineSettings, Flavour

REMEDIES: Mapping[Flavour, str] = MappingProxyType(
    {
        "tensorrt": 'pip install "evla-compile[tensorrt]" on a PC; on a Jetson it comes with JetPack',
        "tensorrt_rtx": 'pip install "evla-compile[rtx]"',
    }
)
"""How to install each flavour."""

_DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "BOOL": "bool",
        "UINT8": "uint8",
        "INT32": "int32",
        "INT64": "int64",
        "HALF": "float16",
        "FLOAT": "float32",
    }
)

logger = logging.getLogger(__name__)


def find_flavour(settings: EngineSettings) -> Flavour:
    """Return the flavour asked for, or the one that is installed.

    Raises:
        EvlaError: none was asked for and none or both are installed; the message says what to do.
        ValueError: the one found does not have a setting.
    """
    if settings.flavour is not None:
        return settings.flavour
    installed = [flavour for flavour in FLAVOURS if _is_installed(flavour)]
    if len(installed) != 1:
        found = " and ".join(FLAVOUR_NAMES[flavour] for flavour in installed)
        raise EvlaError(
            f"{found} are installed: choose by flavour='tensorrt' or 'tensorrt_rtx' (evla build --flavour)"
            if installed
            else f"no library that builds engines is installed: for TensorRT, on the GPU that runs them,"
            f" {REMEDIES['tensorrt']}; for TensorRT-RTX, ahead of time for RTX GPUs, {REMEDIES['tensorrt_rtx']}"
        )
    settings.check_flavour(installed[0])
    return installed[0]


def import_flavour(flavour: Flavour) -> Any:
    """Return the module of a flavour.

    Raises:
        EvlaError: it cannot be imported, or is too old; the message names the package to install.
    """
    try:
        module = import_module(flavour)
    except (ImportError, OSError) as error:  # its loader raises OSError for a missing shared library
        raise EvlaError(f"{FLAVOUR_NAMES[flavour]} cannot be imported ({error}): {REMEDIES[flavour]}") from error
    found = tuple(int(number) for number in re.findall(r"\d+", module.__version__)[:2])
    oldest = OLDEST_VERSIONS[flavour]
    if found < oldest:
        raise EvlaError(
            f"{FLAVOUR_NAMES[flavour]} {module.__version__} is too old: expected {oldest[0]}.{oldest[1]} or newer:"
            f" {REMEDIES[flavour]}"
        )
    return module


def describe_tensor(name: str, dtype: Any, shape: Iterable[int]) -> str:
    """Return a tensor of a network or an engine in the form of `str(TensorSpec)`; other dtypes by TensorRT's name."""
    return f"{name} {_DTYPES.get(dtype.name, dtype.name.lower())}{list(shape)}"


def _is_installed(flavour: Flavour) -> bool:
    try:
        import_module(flavour)
    except (ImportError, OSError):
        return False
    return True


def create(kind: Any, log: Any) -> Any:
    """Return a new `Builder` or `Runtime` of the library.

    Args:
        kind: its class.
        log: what `make_logger` returned.

    Raises:
        EvlaError: the library fails, mostly because there is no GPU or the driver does not fit.
    """
    try:
        return kind(log)
    except TypeError as error:  # the bindings raise it where the library returns a null pointer
        raise EvlaError(f"no {kind.__name__} can be created: {reasons(log.errors)}; see evla doctor") from error


def reasons(errors: Sequence[str]) -> str:
    """Return the first lines of the first errors that the library reported."""
    return " / ".join(map(first_line, errors[:3])) or "it gave no reason"


def first_line(text: str) -> str:
    """Return the first line of a message that is not blank."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "no reason given")


def make_logger(trt: Any) -> Any:
    """Return a logger for the library that collects messages in its lists `errors` and `warnings`."""

    class Log(trt.ILogger):  # type: ignore[misc]  # the library is imported at run time
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.errors.append(message.strip())
            elif severity == trt.ILogger.WARNING:
                self.warnings.append(message.strip())
                logger.info("%s", message)

    return Log()
