"""The table of ONNX Runtime's providers: their names, packages and options."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

from evla_compile.settings.precision import PRECISION_ROWS, Precision

OnnxProvider: TypeAlias = Literal["cpu", "cuda", "tensorrt", "openvino"]
"""Where ONNX Runtime computes."""

Provider: TypeAlias = Literal[OnnxProvider, "engine"]
"""Where a policy computes: ONNX Runtime's providers, or the TensorRT engine that was built from the same graphs."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ExecutionProvider:
    """An execution provider of ONNX Runtime."""

    name: str
    """Its name in ONNX Runtime."""
    package: str
    """Distribution that contains it."""
    extra: str
    """Optional dependency of this package that installs that distribution."""
    options: Mapping[str, str]
    """Options that it is created with."""
    disabled_optimizers: tuple[str, ...] = ()
    """Graph optimizers of ONNX Runtime that make it slower."""
    behind: OnnxProvider | None = None
    """The provider for operators that this one does not take, ahead of the CPU."""

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
            # Adding the bias after the product was up to 10 % faster, on two threads, than the fused operator.
            disabled_optimizers=("MatMulAddFusion",),
        ),
        "cuda": ExecutionProvider(
            name="CUDAExecutionProvider",
            package="onnxruntime-gpu",
            extra="gpu",
            # By default it rounds the factors of float32 products to TF32, which has 11 significant bits.
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
            # By default it computes float32 graphs in 16 bits on CPUs with 16-bit matrix units.
            options=MappingProxyType({"device_type": "CPU", "precision": "ACCURACY"}),
        ),
    }
)
"""The providers by their names in this package."""


def is_widened(provider: Provider, precision: Precision) -> bool:
    """Tell whether a policy of a precision runs in float32 arithmetic: bfloat16 does on the "cpu"."""
    return provider == "cpu" and not PRECISION_ROWS[precision].on_cpu
