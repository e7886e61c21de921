"""Settings of a TensorRT engine build; no torch, no TensorRT."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

from evla_compile.arguments import is_listed, whole_number

Flavour: TypeAlias = Literal["tensorrt", "tensorrt_rtx"]
"""Library that builds and runs engines: TensorRT on the GPU that will run them, or TensorRT-RTX ahead of time, for RTX
GPUs, on any machine."""

FLAVOURS: tuple[Flavour, ...] = get_args(Flavour)
"""All values of `Flavour`, which are also the names of the Python modules."""

FLAVOUR_NAMES: Mapping[Flavour, str] = MappingProxyType({"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"})
"""NVIDIA's names of the flavours."""

RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")
"""Compute capabilities that TensorRT-RTX builds for. It has 7.5 too, but without float32 matrix products, which every
policy needs."""

OLDEST_VERSIONS: Mapping[Flavour, tuple[int, int]] = MappingProxyType({"tensorrt": (10, 3), "tensorrt_rtx": (1, 4)})
"""Oldest versions that have all functions used here; TensorRT 10.3 is that of JetPack 6.2."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineSettings:
    """How to build engines.

    Raises:
        ValueError: a setting is out of its range, or one that the flavour does not have; the message says why.
    """

    flavour: Flavour | None = None
    """Library to build with; None for the one that is installed, where only one is."""
    compute_capabilities: tuple[str, ...] = ()
    """GPUs to build for, such as ("8.6", "8.9", "12.0"), TensorRT-RTX only, all in one engine; empty for its portable
    engines. TensorRT builds for the GPU that it runs on."""
    workspace_bytes: int | None = None
    """Most GPU memory that one layer may take for intermediate results; None leaves it to the library."""
    memory_bytes: int | None = None
    """Most memory that the builder may take: the build is refused if its estimate is larger; None for what is free on
    the machine."""
    optimization_level: int | None = None
    """How long to look for fast kernels, 0 to 5; None leaves it to the library. TensorRT only."""
    timing_cache: Path | None = None
    """File in which TensorRT keeps its timings of kernels, so that the next build is faster; created if missing.
    TensorRT-RTX times nothing when it builds."""
    hardware_compatible: bool = False
    """Whether the engine shall run on every GPU from compute capability 8.0 on, at some cost in speed; TensorRT only,
    not on a Jetson."""
    version_compatible: bool = False
    """Whether later versions of TensorRT shall run the engine, at some cost in speed; TensorRT only. Such an engine
    contains code that the runtime executes: load it only from a source that you trust."""

    def __post_init__(self) -> None:
        if self.flavour is not None and self.flavour not in FLAVOURS:
            raise ValueError(f"flavour={self.flavour!r}: expected one of {', '.join(FLAVOURS)}")
        object.__setattr__(self, "compute_capabilities", _capabilities(self.compute_capabilities))
        if self.timing_cache is not None:
            object.__setattr__(self, "timing_cache", Path(self.timing_cache))
        limits: dict[str, tuple[int, int | None, str]] = {
            "workspace_bytes": (1, None, "bytes"),
            "memory_bytes": (1, None, "bytes"),
            "optimization_level": (0, 5, ""),
        }
        for name, (low, high, unit) in limits.items():
            value = getattr(self, name)
            if value is not None:
                plain = whole_number(name, value, low=low, high=high, of=unit, otherwise="None")
                object.__setattr__(self, name, plain)
        if len(set(self.compute_capabilities)) != len(self.compute_capabilities):
            raise ValueError(f"compute_capabilities={self.compute_capabilities}: expected each once")
        if self.flavour is not None:
            self.check_flavour(self.flavour)

    def check_flavour(self, flavour: Flavour) -> None:
        """Refuse settings that `flavour` does not have.

        Raises:
            ValueError: the message names the setting and the reason.
        """
        if flavour == "tensorrt":
            if self.compute_capabilities:
                raise ValueError(
                    f"compute_capabilities={self.compute_capabilities} with TensorRT, which builds for the GPU that it"
                    " runs on: build on that machine, or with hardware_compatible=True, or with TensorRT-RTX"
                )
            return
        for name, reason in _NOT_IN_RTX.items():
            if getattr(self, name) not in (None, False):
                raise ValueError(f"{name}={getattr(self, name)!r} with TensorRT-RTX: {reason}")
        for capability in self.compute_capabilities:
            if capability not in RTX_CAPABILITIES:
                reason = _REASONS.get(capability, "it is not among those")
                raise ValueError(
                    f"compute capability {capability}: TensorRT-RTX builds for {', '.join(RTX_CAPABILITIES)}; {reason}"
                )


def _capabilities(given: object) -> tuple[str, ...]:
    """Return compute capabilities as texts; accepts a single one, a list, and numbers such as 8.9."""
    listed: Sequence[object] = given if is_listed(given) else [given]
    found = tuple(f"{value:.1f}" if isinstance(value, float) else value for value in listed)
    for value in found:
        if not isinstance(value, str) or not re.fullmatch(r"\d{1,2}\.\d", value):
            raise ValueError(f'compute_capabilities={given!r}: expected texts, as in ("8.9", "12.0")')
    return tuple(str(value) for value in found)


_NOT_IN_RTX: Mapping[str, str] = MappingProxyType(
    {
        "optimization_level": "it has no kernels to choose from before it meets the GPU; leave it at None",
        "timing_cache": "it measures nothing when it builds; leave it at None",
        "hardware_compatible": "its engines run on every GPU named in compute_capabilities already",
        "version_compatible": "its builder lacks the lean runtime that such an engine carries; build once per version",
    }
)
_REASONS: Mapping[str, str] = MappingProxyType(
    {
        "7.5": "on Turing it has no float32 matrix products, which the action head needs",
        "8.7": "Orin is for TensorRT (flavour tensorrt, on the Jetson itself)",
        "9.0": "H100 and H200 are for TensorRT (flavour tensorrt, on such a machine)",
        "10.0": "B200 is for TensorRT (flavour tensorrt, on such a machine)",
        "11.0": "Thor is for TensorRT (flavour tensorrt, on the Jetson itself)",
    }
)
