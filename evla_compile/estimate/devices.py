"""Devices and their rooflines: lower bounds of a policy's run time, from datasheets alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """One GPU as its datasheet describes it, at the boost clock given there."""

    name: str
    """Product name."""
    memory_bytes: float
    """Memory in bytes, the datasheet's GB read as 10^9; on a Jetson the CPU shares it."""
    bandwidth: float
    """Memory bandwidth in bytes/s."""
    float32_flops: float
    """Peak FLOP/s of float32 arithmetic on CUDA cores: without TF32, which rounds float32 to 11 bits."""
    bfloat16_flops: float
    """Peak FLOP/s of dense bfloat16 products on tensor cores with float32 accumulation, which PyTorch and TensorRT use.

    Datasheets headline twice as much, for 2:4 sparsity; GeForce cards do float16 accumulation twice as fast.
    """
    gpu_names: tuple[str, ...] = ()
    """What `torch.cuda.get_device_name` returns for it; empty where several modules of one family share a name."""
    source: str
    """Document with the numbers, and how the others are derived from them."""

    def roofline_seconds(self, *, flops: float, weight_bytes: float, dtype: str) -> float:
        """Return a lower bound of the time of some arithmetic: the longer of computing it and reading its weights.

        Every weight is read once and activations cost nothing, so that no implementation is faster, and real ones are
        slower. For parts that run one after the other, the sum of their bounds is a tighter bound.

        Args:
            flops: floating-point operations, two per multiply-accumulate.
            weight_bytes: bytes of the weights that the arithmetic reads.
            dtype: "float32" or "bfloat16", in which products are computed.

        Raises:
            ValueError: another dtype.
        """
        peaks = {"float32": self.float32_flops, "bfloat16": self.bfloat16_flops}
        if dtype not in peaks:
            raise ValueError(f"dtype={dtype!r}: peaks are known for {sorted(peaks)}")
        return max(flops / peaks[dtype], weight_bytes / self.bandwidth)


def find_device(gpu_name: str) -> Device | None:
    """Return the device whose driver calls it `gpu_name`, as in `torch.cuda.get_device_name`; None if unknown.

    Names match as a whole: laptop, PCIe, NVL and MIG variants are other devices. Jetson modules are never found, since
    every Orin calls itself "Orin" and every Thor "NVIDIA Thor"; take theirs from `DEVICES`.
    """
    return next((device for device in DEVICES.values() if gpu_name in device.gpu_names), None)


DEVICES: Mapping[str, Device] = MappingProxyType(
    {
        "agx-orin": Device(
            name="Jetson AGX Orin 64GB",
            memory_bytes=64e9,
            bandwidth=204.8e9,
            float32_flops=5.3e12,
            bfloat16_flops=42.5e12,
            source=(
                "NVIDIA Jetson AGX Orin Series Technical Brief v1.2: 5.3 FP32 TFLOPS, 170 sparse INT8 TOPS of the GPU;"
                " bfloat16 is a quarter of that (dense, twice the width)"
            ),
        ),
        "thor": Device(
            name="Jetson Thor T5000",
            memory_bytes=128e9,
            bandwidth=273e9,
            float32_flops=8.06e12,
            bfloat16_flops=258e12,
            source=(
                "NVIDIA Jetson Thor Series Modules Data Sheet: 2070 sparse FP4 TFLOPS; bfloat16 is an eighth of that"
                " (dense, four times the width); float32 is 2560 cores x 2 x 1.575 GHz"
            ),
        ),
        "rtx-4090": Device(
            name="GeForce RTX 4090",
            memory_bytes=24e9,
            bandwidth=1008e9,
            float32_flops=82.6e12,
            bfloat16_flops=165.2e12,
            gpu_names=("NVIDIA GeForce RTX 4090",),
            source="NVIDIA Ada GPU Architecture whitepaper, appendix A",
        ),
        "rtx-5090": Device(
            name="GeForce RTX 5090",
            memory_bytes=32e9,
            bandwidth=1792e9,
            float32_flops=104.8e12,
            bfloat16_flops=209.5e12,
            gpu_names=("NVIDIA GeForce RTX 5090",),
            source="NVIDIA RTX Blackwell GPU Architecture whitepaper, appendix A",
        ),
        "h100": Device(
            name="H100 SXM",
            memory_bytes=80e9,
            bandwidth=3.35e12,
            float32_flops=67e12,
            bfloat16_flops=989.5e12,
            gpu_names=("NVIDIA H100 80GB HBM3",),
            source="NVIDIA H100 Tensor Core GPU Datasheet: 1979 bfloat16 TFLOPS with sparsity, halved",
        ),
        "h200": Device(
            name="H200 SXM",
            memory_bytes=141e9,
            bandwidth=4.8e12,
            float32_flops=67e12,
            bfloat16_flops=989.5e12,
            gpu_names=("NVIDIA H200",),
            source="NVIDIA H200 Tensor Core GPU Datasheet: 1979 bfloat16 TFLOPS with sparsity, halved",
        ),
    }
)
"""Devices by short name."""
