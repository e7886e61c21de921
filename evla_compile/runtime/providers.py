"""ONNX Runtime's providers, each described once: its names, what installs it, and the options it is asked for with."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from evla_compile.settings.config import Precision

OnnxProvider: TypeAlias = Literal["cpu", "cuda", "tensorrt", "openvino"]
"""Where ONNX Runtime computes."""

Provider: TypeAlias = Literal[OnnxProvider, "engine"]
"""Where a policy computes: ONNX Runtime's providers, or the TensorRT engine that was built from the same graphs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionProvider:
    """One of ONNX Runtime's execution providers, as it is used here."""

    name: str
    """What ONNX Runtime calls it."""
    package: str
    """Distribution that brings it."""
    extra: str
    """Optional dependency of this package that installs that distribution."""
    options: Mapping[str, str]
    """Options that it is asked for with."""
    disabled_optimizers: tuple[str, ...] = ()
    """ONNX Runtime's graph rewrites that it is better off without."""
    behind: OnnxProvider | None = None
    """The provider that takes what this one cannot compute, before the CPU does."""

    @property
    def remedy(self) -> str:
        """The command that installs it."""
        return f'pip install "evla-compile[{self.extra}]"'


PROVIDERS: Mapping[OnnxProvider, ExecutionProvider] = MappingProxyType(
    {
        "cpu": ExecutionProvider(
            name="CPUExecutionProvider",
            package="onnxruntime",
            extra="cpu",
            options=MappingProxyType({}),
            # A bias added behind its product was up to 10 % faster, on two threads, than the fusion of the two.
            disabled_optimizers=("MatMulAddFusion",),
        ),
        "cuda": ExecutionProvider(
            name="CUDAExecutionProvider",
            package="onnxruntime-gpu",
            extra="gpu",
            # By default it rounds the factors of float32 products to 11 bits (TF32).
            options=MappingProxyType({"use_tf32": "0"}),
        ),
        "tensorrt": ExecutionProvider(
            name="TensorrtExecutionProvider",
            package="onnxruntime-gpu",
            extra="gpu",
            options=MappingProxyType({"trt_fp16_enable": "0", "trt_int8_enable": "0"}),
            behind="cuda",
        ),
        "openvino": ExecutionProvider(
            name="OpenVINOExecutionProvider",
            package="onnxruntime-openvino",
            extra="openvino",
            # On CPUs with 16-bit matrix units it computes float32 graphs in 16 bits unless it is told otherwise.
            options=MappingProxyType({"device_type": "CPU", "precision": "ACCURACY"}),
        ),
    }
)
"""The providers, by the names that they have here."""


def is_widened(provider: Provider, precision: Precision) -> bool:
    """Tell whether a policy of a precision runs in float32 arithmetic: bfloat16 does on a CPU, which has none of it."""
    return provider == "cpu" and precision == "bfloat16"
