"""What is known of each precision in which a policy can be exported: one table; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias, get_args

Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
"""Dtype of the weights and matrix products of vision, projector and decoder in an exported file."""

PRECISIONS: tuple[Precision, ...] = get_args(Precision)
"""All values of `Precision`."""

LowerPrecisionName: TypeAlias = Literal["bfloat16", "float16"]
"""What a float32 graph can be lowered to."""

LOWER_PRECISIONS: tuple[LowerPrecisionName, ...] = get_args(LowerPrecisionName)
"""All values of `LowerPrecisionName`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PrecisionRow:
    """What is known of one precision."""

    bytes: int
    """Bytes of a stored weight."""
    features: float
    """Largest relative error that is accepted of a stage up to the cognition feature, against the float32 graph."""
    actions: float
    """The same of the denoising steps and samples."""
    limit: float | None = None
    """Largest value that calibration may have observed in a layer that is lowered; None where the range of float32 is
    kept. Half of what the dtype holds: what was not observed may be larger."""
    on_cpu: bool = True
    """Whether ONNX Runtime computes in it on a CPU."""


PRECISION_ROWS: Mapping[Precision, PrecisionRow] = MappingProxyType(
    {
        "float32": PrecisionRow(bytes=4, features=1e-4, actions=1e-4),
        # 8 significant bits; keeping another patch counts more than the rounding
        "bfloat16": PrecisionRow(bytes=2, features=1e-1, actions=3e-2, on_cpu=False),
        # 11 significant bits, and 65504 is the largest number
        "float16": PrecisionRow(bytes=2, features=1e-2, actions=5e-3, limit=65504 / 2),
    }
)
"""The table; the keys are the dtypes' names in numpy, torch and manifests."""
