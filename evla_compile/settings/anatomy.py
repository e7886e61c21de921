"""Anatomy of a policy family: the names, dtypes and axes that its graphs use; no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

IMAGE, INPUT_IDS, TEXT_LENGTH, NOISE = "image", "input_ids", "text_length", "noise"
"""Names of the inputs of a finished graph, and of the fields of `evla_compile.host.inputs.GraphInputs`."""

PATCHES, PROJECTED, LAYERS, COGNITION, DENOISED, SAMPLES = (
    *("patches", "projected", "layers", "cognition", "denoising", "samples"),
)
"""Names of the stages of a graph; see `evla_compile.passes.ExposeStages`."""

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


ToleranceClass: TypeAlias = Literal["features", "actions"]
"""Which tolerance of a precision holds: up to the cognition feature, or from the first denoising step on."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A value, or a numbered row of values, at which lowerings are compared."""

    name: str
    """Name of the value in graphs; of numbered ones, the word in front of the number: `layers` of `layers.3`."""
    tolerance: ToleranceClass = "features"
    """Which tolerance holds."""
    numbered: Literal["layer", "step"] | None = None
    """What there is one of it for, if more than one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Anatomy:
    """What there is in a policy of one family: where its modules stand, what it takes, and what it computes."""

    vision: str
    """Module path of the vision towers."""
    vision_towers: tuple[str, ...]
    """Module paths of each of them."""
    projector: str
    """Module path of what turns patches into the decoder's hidden states."""
    language: str
    """Module path of the decoder with its embedding."""
    decoder_layers: str
    """Module path under which the decoder layers stand, by index."""
    action_model: str
    """Module path of the diffusion transformer, which predicts the noise of one denoising step."""
    denoising: str
    """Module path under which a finished graph has the copies of the action model, by denoising step."""
    inputs: tuple[InputForm, ...]
    """Inputs of a finished graph, in the order in which it takes them."""
    stages: tuple[Stage, ...]
    """What lowerings are compared at, in data-flow order; the last is the graph's output."""

    @property
    def lowered(self) -> tuple[str, ...]:
        """Modules whose matrix products may be lowered; the action head stays float32."""
        return self.vision, self.projector, self.language

    @property
    def roots(self) -> tuple[str, ...]:
        """Module paths that everything with a weight stands under."""
        return *self.lowered, self.action_model

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in their order."""
        return tuple(form.name for form in self.inputs)

    def is_verified(self, stage: str) -> bool:
        """Tell whether lowerings are compared at a stage, by its name such as `layers.3`."""
        return any(stage.partition(".")[0] == known.name for known in self.stages)

    def tolerance_of(self, stage: str) -> ToleranceClass:
        """Return which tolerance holds for a stage; for what is none, such as kept patches, that of features."""
        found = (known.tolerance for known in self.stages if stage.partition(".")[0] == known.name)
        return next(found, "features")


COGACT = Anatomy(
    vision="vision_backbone",
    vision_towers=("vision_backbone.dino_featurizer", "vision_backbone.siglip_featurizer"),
    projector="projector",
    language="llm_backbone",
    decoder_layers="llm_backbone.llm.model.layers",
    action_model="action_model",
    denoising="denoising",
    inputs=(
        InputForm(name=IMAGE, dtype="uint8", axes=("batch", "side", "side", "channels")),
        InputForm(name=INPUT_IDS, dtype="int64", axes=("batch", "text")),
        InputForm(name=TEXT_LENGTH, dtype="int64", axes=("batch",)),
        InputForm(name=NOISE, dtype="float32", axes=("batch", "chunk", "width")),
    ),
    stages=(
        Stage(name=PATCHES),
        Stage(name=PROJECTED),
        Stage(name=LAYERS, numbered="layer"),
        Stage(name=COGNITION),
        Stage(name=DENOISED, tolerance="actions", numbered="step"),
        Stage(name=SAMPLES, tolerance="actions"),
    ),
)
"""The policies that are compiled: CogACT of any size."""
