"""The four inputs of a finished graph, and how they are prepared from frames, instructions and noise; no torch.

Shape legend: B batch, S image side in pixels, T text budget, A action steps, F action dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeGuard

import numpy as np
from numpy.typing import NDArray

from evla_compile.arguments import is_listed, whole_number
from evla_compile.host.camera_frame import FRAME_RANK, CameraFrame, Framing
from evla_compile.host.processor import Processor
from evla_compile.settings.anatomy import COGACT, Axis
from evla_compile.settings.sizes import ModelSizes

SHORTEST_TEXT = 2
"""Fewest tokens of a prompt: its first and its last."""

_COLOURS = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSignature:
    """The sizes that the inputs of one finished graph have."""

    batch_size: int
    """B."""
    image_side: int
    """S."""
    text_tokens: int
    """T."""
    chunk: int
    """A."""
    action_width: int
    """F."""
    vocabulary: int
    """Rows of the token embedding: token ids are below it."""

    @classmethod
    def of(cls, sizes: ModelSizes, *, batch_size: int, text_tokens: int) -> Self:
        """Return the signature of a policy of these sizes at a batch size and text budget."""
        return cls(
            batch_size=batch_size,
            image_side=sizes.image_side,
            text_tokens=text_tokens,
            chunk=sizes.action.chunk,
            action_width=sizes.action.action_width,
            vocabulary=sizes.language.vocabulary,
        )

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every input by name, in the order of the graph."""
        sizes: dict[Axis, int] = {
            "batch": self.batch_size,
            "side": self.image_side,
            "channels": _COLOURS,
            "text": self.text_tokens,
            "chunk": self.chunk,
            "width": self.action_width,
        }
        return {form.name: form.shape(sizes) for form in COGACT.inputs}

    @property
    def noise_shape(self) -> tuple[int, int, int]:
        """Shape of the noise, (B, A, F)."""
        return self.batch_size, self.chunk, self.action_width


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GraphInputs:
    """The inputs of one call of a finished graph, in host memory; fields in the order of the graph's inputs."""

    image: NDArray[np.uint8]
    """Squashed frames, [B,S,S,3]."""
    input_ids: NDArray[np.int64]
    """Token ids of the prompts, right-padded, [B,T]."""
    text_length: NDArray[np.int64]
    """Real tokens of each prompt, from 2 to T, [B]."""
    noise: NDArray[np.float32]
    """Standard normal noise from which the sampler starts, [B,A,F]."""

    @classmethod
    def prepare(
        cls,
        processor: Processor,
        image: CameraFrame | Sequence[CameraFrame],
        instruction: str | Sequence[str],
        signature: InputSignature,
        *,
        noise: NDArray[np.floating] | None = None,
        seed: int | None = None,
        framing: Framing = "whole",
    ) -> Self:
        """Turn frames, instructions and noise into the inputs of a graph with a static batch.

        Args:
            processor: the policy's host side.
            image: B frames, as a sequence or one array [B,H,W,3]; or a single frame where B is 1.
            instruction: B instructions; or a single one where B is 1.
            signature: sizes of the graph's inputs.
            noise: see `action_noise`.
            seed: see `action_noise`.
            framing: what the policy sees of a frame; see `evla_compile.host.camera_frame.Framing`.

        Raises:
            ValueError: the number of frames or of instructions is another, one of them is refused by the processor, or
                the noise or the seed is refused.
        """
        # Each is prepared before they are counted, so that an argument of a wrong type is not called a wrong number.
        images: Sequence[Any] = image if is_batch(image) else [image]
        texts: Sequence[Any] = instruction if is_listed(instruction) else [instruction]
        frames = [processor.image(frame, framing) for frame in images]
        prompts = [processor.text(text, signature.text_tokens) for text in texts]
        batch = signature.batch_size
        for name, found in (("image", len(frames)), ("instruction", len(prompts))):
            if found != batch:
                raise ValueError(f"{name}: {found} given, but the policy works on batches of {batch} (batch_size)")
        return cls(
            image=np.stack(frames),
            input_ids=np.stack([ids for ids, _ in prompts]),
            text_length=np.array([length for _, length in prompts], dtype=np.int64),
            noise=action_noise(noise, seed, signature.noise_shape),
        )

    @classmethod
    def blank(cls, signature: InputSignature) -> Self:
        """Return zeros of the right dtypes and shapes, shortest prompts: for capturing, never for an action."""
        arrays = {form.name: np.zeros(signature.shapes[form.name], dtype=form.dtype) for form in COGACT.inputs}
        inputs = cls(**arrays)
        inputs.text_length[...] = SHORTEST_TEXT
        return inputs

    @property
    def arrays(self) -> tuple[NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
        """The inputs in the order of the graph."""
        return self.image, self.input_ids, self.text_length, self.noise

    @property
    def by_name(self) -> dict[str, NDArray[Any]]:
        """The inputs by name, in the order of the graph."""
        return dict(zip(COGACT.input_names, self.arrays, strict=True))

    def check(self, signature: InputSignature) -> None:
        """Refuse inputs that a graph with static shapes cannot take, or would silently read wrong positions for.

        Raises:
            ValueError: an input is not a numpy array of its dtype and shape, a token id has no row in the embedding, or
                a text length is not from 2 to T.
        """
        values, shapes = self.by_name, signature.shapes
        for form in COGACT.inputs:
            _check_form(form.name, values[form.name], form.dtype, shapes[form.name])
        low, high = self.input_ids.min(), self.input_ids.max()
        if low < 0 or high >= signature.vocabulary:  # ONNX Runtime counts negative ids from the embedding's end
            raise ValueError(f"input_ids has ids from {low} to {high}: expected from 0 to {signature.vocabulary - 1}")
        if self.text_length.min() < SHORTEST_TEXT or self.text_length.max() > signature.text_tokens:
            raise ValueError(
                f"text_length={self.text_length.tolist()}: expected from {SHORTEST_TEXT} to {signature.text_tokens}"
            )


def is_batch(image: object) -> TypeGuard[Sequence[CameraFrame]]:
    """Tell whether camera frames are given for a batch: a sequence of frames, or an array [B,H,W,3]."""
    return image.ndim == FRAME_RANK + 1 if isinstance(image, np.ndarray) else is_listed(image)


def observations(frames: Sequence[tuple[CameraFrame, str]], batch_size: int) -> Iterator[list[tuple[CameraFrame, str]]]:
    """Yield a batch for every frame: the frame itself, then those that follow it, around the end."""
    for first in range(len(frames)):
        yield [frames[(first + row) % len(frames)] for row in range(batch_size)]


def draw_noise(shape: tuple[int, ...], seed: int) -> NDArray[np.float32]:
    """Return standard normal float32 noise of a shape; the same seed gives the same noise on every backend."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal(shape, dtype=np.float32)


def action_noise(
    noise: NDArray[np.floating] | None, seed: int | None, shape: tuple[int, int, int]
) -> NDArray[np.float32]:
    """Return the noise from which the sampler starts, float32 [B,A,F].

    Without `noise` and `seed` it is that of seed 0, so that a call can be repeated. Upstream CogACT draws fresh noise
    in every call; give another seed in each control step to do the same.

    Args:
        noise: float array [B,A,F], or [A,F] where the batch is 1; float64 is rounded.
        seed: whole number from 0 up.
        shape: (B, A, F).

    Raises:
        ValueError: both are given, the seed is negative, or the noise has another shape, is no float array, or is not
            finite.
    """
    if noise is None:
        return draw_noise(shape, 0 if seed is None else whole_number("seed", seed, low=0))
    if seed is not None:
        raise ValueError(f"noise and seed={seed!r} are both given: the seed only draws noise, so give one of them")
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        found = noise.dtype if isinstance(noise, np.ndarray) else type(noise).__name__
        raise ValueError(f"noise is of {found}: expected a float array of the shape {list(shape)}")
    if noise.shape != shape and (shape[0] != 1 or noise.shape != shape[1:]):
        raise ValueError(f"noise has the shape {list(noise.shape)}: expected {list(shape)}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused next
        rounded = noise.astype(np.float32).reshape(shape)
    if not np.isfinite(rounded).all():
        raise ValueError("noise holds values that are infinite or not a number: expected standard normal float32")
    return rounded


def _check_form(name: str, value: object, dtype: str, shape: tuple[int, ...]) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name} is {found}: expected a numpy array {dtype}{list(shape)}")
