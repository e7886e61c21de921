"""Frames, instructions and noise to the inputs of a graph; no torch.

Shape legend: B batch, S image side in pixels, T text budget, A action steps, F action dimensions.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from evla_compile.arguments import is_listed, whole_number
from evla_compile.host.camera_frame import FRAME_RANK, CameraFrame, Framing
from evla_compile.host.processor import Processor, draw_noise


@dataclass(frozen=True, kw_only=True, slots=True)
class HostInputs:
    """What the host prepares for the graph; noise apart."""

    image: NDArray[np.uint8]
    """Squashed frames, [B,S,S,3]."""
    input_ids: NDArray[np.int64]
    """Token ids of the prompts, right-padded, [B,T]."""
    text_length: NDArray[np.int64]
    """Real tokens of each prompt, [B]."""


def prepare(
    processor: Processor,
    image: CameraFrame | Sequence[CameraFrame],
    instruction: str | Sequence[str],
    *,
    text_tokens: int,
    batch_size: int,
    framing: Framing = "whole",
) -> HostInputs:
    """Turn frames and instructions into the inputs of a graph with a static batch.

    Args:
        processor: the policy's host side.
        image: `batch_size` frames, a sequence of them or one array [B,H,W,3]; a single frame will do where that is 1.
        instruction: `batch_size` instructions; a single one will do where that is 1.
        text_tokens: T, the text budget.
        batch_size: B, the batch of the graph.
        framing: what the policy sees of a frame; see `evla_compile.host.camera_frame.Framing`.

    Raises:
        ValueError: the number of frames or of instructions is another, or one of them is refused by the processor.
    """
    # Each is prepared before all are counted: what is no frame at all would else be called a wrong number of them.
    images: Sequence[Any] = image if is_batch(image) else [image]
    texts: Sequence[Any] = instruction if is_listed(instruction) else [instruction]
    frames = [processor.image(frame, framing) for frame in images]
    prompts = [processor.text(text, text_tokens) for text in texts]
    for name, found in (("image", len(frames)), ("instruction", len(prompts))):
        if found != batch_size:
            raise ValueError(f"{name}: {found} given, but the policy works on batches of {batch_size} (batch_size)")
    return HostInputs(
        image=np.stack(frames),
        input_ids=np.stack([ids for ids, _ in prompts]),
        text_length=np.array([length for _, length in prompts], dtype=np.int64),
    )


def is_batch(image: object) -> TypeGuard[Sequence[CameraFrame]]:
    """Tell whether camera frames are given for a batch: a sequence of frames, or an array [B,H,W,3]."""
    return image.ndim == FRAME_RANK + 1 if isinstance(image, np.ndarray) else is_listed(image)


def observations(frames: Sequence[tuple[CameraFrame, str]], batch_size: int) -> Iterator[list[tuple[CameraFrame, str]]]:
    """Yield a batch for every frame: the frame itself, then those that follow it, around the end."""
    for first in range(len(frames)):
        yield [frames[(first + row) % len(frames)] for row in range(batch_size)]


def check_input(name: str, value: object, *, dtype: str, shape: tuple[int, ...]) -> None:
    """Refuse what a graph with static shapes does not take.

    Raises:
        ValueError: `value` is not a numpy array of this dtype and shape.
    """
    if not isinstance(value, np.ndarray) or value.dtype != dtype or value.shape != shape:
        found = f"{value.dtype}{list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"{name} is {found}: expected a numpy array {dtype}{list(shape)}")


def check_text_length(text_length: NDArray[np.int64], text_tokens: int) -> None:
    """Refuse lengths beyond which the graph would read a wrong position without complaint.

    Raises:
        ValueError: a length is not from 2 to `text_tokens`.
    """
    if text_length.min() < 2 or text_length.max() > text_tokens:
        raise ValueError(f"text_length={text_length.tolist()}: expected from 2 to {text_tokens}")


def check_input_ids(input_ids: NDArray[np.int64], vocabulary: int) -> None:
    """Refuse ids without a row in the token embedding; ONNX Runtime counts negative ones from the embedding's end.

    Raises:
        ValueError: an id is not from 0 to `vocabulary` - 1.
    """
    if input_ids.min() < 0 or input_ids.max() >= vocabulary:
        raise ValueError(
            f"input_ids has ids from {input_ids.min()} to {input_ids.max()}: expected from 0 to {vocabulary - 1}"
        )


def action_noise(
    noise: NDArray[np.floating] | None, seed: int | None, *, batch_size: int, chunk: int, width: int
) -> NDArray[np.float32]:
    """Return the noise from which the sampler starts, float32 [B,A,F].

    Without `noise` and `seed` it is that of seed 0, so that a call can be repeated. Upstream CogACT draws fresh noise
    in every call; give another seed in each control step to do the same.

    Args:
        noise: float array [B,A,F], or [A,F] where the batch is 1; float64 is rounded.
        seed: whole number from 0 up.
        batch_size: B.
        chunk: A.
        width: F.

    Raises:
        ValueError: both are given, the seed is negative, or the noise has another shape, is no float array, or is not
            finite.
    """
    shape = (batch_size, chunk, width)
    if noise is None:
        return draw_noise(shape, 0 if seed is None else whole_number("seed", seed, low=0))
    if seed is not None:
        raise ValueError(f"noise and seed={seed!r} are both given: the seed only draws noise, so give one of them")
    if not isinstance(noise, np.ndarray) or noise.dtype.kind != "f":
        found = noise.dtype if isinstance(noise, np.ndarray) else type(noise).__name__
        raise ValueError(f"noise is of {found}: expected a float array of the shape {list(shape)}")
    if noise.shape != shape and (batch_size != 1 or noise.shape != shape[1:]):
        raise ValueError(f"noise has the shape {list(noise.shape)}: expected {list(shape)}")
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes infinite, which is refused next
        rounded = noise.astype(np.float32).reshape(shape)
    if not np.isfinite(rounded).all():
        raise ValueError("noise holds values that are infinite or not a number: expected standard normal float32")
    return rounded
