"""A graph compiler for the CogACT robot policy: `load`, `compile`, `verify`, and a runtime without torch.

Names that need torch are imported when they are first used, so that `import evla_compile.runtime` imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from evla_compile.errors import (
    ArtifactError,
    CalibrationError,
    CheckpointError,
    EvlaError,
    ExportError,
    PassError,
    UnsupportedModelError,
    VerificationError,
)
from evla_compile.settings.config import PRESETS, CompileConfig
from evla_compile.settings.engine_settings import EngineSettings

if TYPE_CHECKING:
    from evla_compile import runtime
    from evla_compile.calibration.calibrate import calibrate
    from evla_compile.compiled_policy import CompiledPolicy, compile
    from evla_compile.estimate.devices import DEVICES, Device, find_device
    from evla_compile.estimate.estimates import Estimate, estimate_upstream, estimates, quick_estimates
    from evla_compile.exporters.build import build_engine
    from evla_compile.families.cogact.loading.checkpoint import load
    from evla_compile.fidelity.chunks import ActionChunks
    from evla_compile.fidelity.measure import Fidelity
    from evla_compile.host.frames import Frame, read_frames
    from evla_compile.recordings.source import read_recording
    from evla_compile.settings.plan import Plan
    from evla_compile.settings.sizes import published_sizes
    from evla_compile.verification.fidelity import measure_fidelity, record_chunks
    from evla_compile.verification.verify import verify

__version__ = "0.1.0"

__all__ = [
    "DEVICES",
    "PRESETS",
    "ActionChunks",
    "ArtifactError",
    "CalibrationError",
    "CheckpointError",
    "CompileConfig",
    "CompiledPolicy",
    "Device",
    "EngineSettings",
    "Estimate",
    "EvlaError",
    "ExportError",
    "Fidelity",
    "Frame",
    "PassError",
    "Plan",
    "UnsupportedModelError",
    "VerificationError",
    "__version__",
    "build_engine",
    "calibrate",
    "compile",
    "estimate_upstream",
    "estimates",
    "find_device",
    "load",
    "measure_fidelity",
    "published_sizes",
    "quick_estimates",
    "read_frames",
    "read_recording",
    "record_chunks",
    "runtime",
    "verify",
]

_HOMES = {
    "ActionChunks": "fidelity.chunks",
    "CompiledPolicy": "compiled_policy",
    "DEVICES": "estimate.devices",
    "Device": "estimate.devices",
    "Estimate": "estimate.estimates",
    "Fidelity": "fidelity.measure",
    "Frame": "host.frames",
    "Plan": "settings.plan",
    "build_engine": "exporters.build",
    "calibrate": "calibration.calibrate",
    "compile": "compiled_policy",
    "estimate_upstream": "estimate.estimates",
    "estimates": "estimate.estimates",
    "find_device": "estimate.devices",
    "load": "families.cogact.loading.checkpoint",
    "measure_fidelity": "verification.fidelity",
    "published_sizes": "settings.sizes",
    "quick_estimates": "estimate.estimates",
    "read_frames": "host.frames",
    "read_recording": "recordings.source",
    "record_chunks": "verification.fidelity",
    "verify": "verification.verify",
}


def __getattr__(name: str) -> Any:
    if name == "runtime":
        return import_module("evla_compile.runtime")
    if name not in _HOMES:
        raise AttributeError(f"module 'evla_compile' has no attribute {name!r}")
    return getattr(import_module(f"evla_compile.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
