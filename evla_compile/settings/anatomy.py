"""Anatomy of a policy family: the names, dtypes and axes that its graphs use; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

IMAGE, INPUT_IDS, TEXT_LENGTH, NOISE = "image", "input_ids", "text_length", "noise"
"""Names of the inputs of a finished graph, and of the fields of `evla_compile.host.inputs.GraphInputs`."""

Axis: TypeAlias = Literal["batch", "side", "channels", "text", "chunk", "width"]
"""A size of an input: B, S, 3, T, A and F of the shape legends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputForm:
    """Name, dtype and axes of one input of a finished graph."""

    name: str
    """Name in the graph."""
    dtype: str
    """Dtype, by numpy's name."""
    axes: tuple[Axis, ...]
    """Meaning of its axes, in order."""

    def shape(self, sizes: Mapping[Axis, int]) -> tuple[int, ...]:
        """Return its shape, given the size of every axis."""
        return tuple(sizes[axis] for axis in self.axes)


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """Description of one policy family."""

    inputs: tuple[InputForm, ...]
    """Inputs of a finished graph, in the order in which it takes them."""

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in their order."""
        return tuple(form.name for form in self.inputs)


COGACT = Anatomy(
    inputs=(
        InputForm(name=IMAGE, dtype="uint8", axes=("batch", "side", "side", "channels")),
        InputForm(name=INPUT_IDS, dtype="int64", axes=("batch", "text")),
        InputForm(name=TEXT_LENGTH, dtype="int64", axes=("batch",)),
        InputForm(name=NOISE, dtype="float32", axes=("batch", "chunk", "width")),
    ),
)
