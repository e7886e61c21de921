"""Between a camera frame and an action chunk: the host work that every backend shares; no torch.

Shape legend: B batch, S image side in pixels, T text budget, A action steps, F action dimensions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeGuard

import numpy as np
from numpy.typing import NDArray

from evla_compile.arguments import is_listed, whole_number
from evla_compile.camera_frame import FRAME_RANK, CameraFrame, Framing
from evla_compile.config import CompileConfig
from evla_compile.processor import Processor, draw_noise

Sampler: TypeAlias = Callable[
    [NDArray[np.uint8], NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]], NDArray[np.float32]
]
"""A backend: image, input_ids, text_length and noise, as the graph takes them -> raw samples float32 [B,A,F]."""


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
        framing: what the policy sees of a frame; see `evla_compile.camera_frame.Framing`.

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


def predict_action(
    sample: Sampler,
    processor: Processor,
    image: CameraFrame | Sequence[CameraFrame],
    instruction: str | Sequence[str],
    *,
    unnorm_key: str | None,
    noise: NDArray[np.floating] | None,
    seed: int | None,
    text_tokens: int,
    batch_size: int,
    chunk: int,
    width: int,
    framing: Framing = "whole",
) -> NDArray[np.float64]:
    """Run a backend from frames and instructions to actions in the units of a dataset.

    Args:
        sample: the backend.
        processor: the policy's host side.
        image: see `prepare`.
        instruction: see `prepare`.
        unnorm_key: name of the dataset whose statistics scale the actions; None where only one is known.
        noise: see `action_noise`.
        seed: see `action_noise`.
        text_tokens: T, the text budget.
        batch_size: B, the batch of the graph.
        chunk: A.
        width: F.
        framing: see `prepare`.

    Returns:
        Actions [A,F] for a single frame, [B,A,F] for a sequence of frames.

    Raises:
        ValueError: an argument is refused, or the backend's samples are not finite.
    """
    processor.statistics_for(unnorm_key)  # a wrong name should not cost a run of the policy
    inputs = prepare(processor, image, instruction, text_tokens=text_tokens, batch_size=batch_size, framing=framing)
    start = action_noise(noise, seed, batch_size=batch_size, chunk=chunk, width=width)
    actions = processor.actions(sample(inputs.image, inputs.input_ids, inputs.text_length, start), unnorm_key)
    return actions if is_batch(image) else actions[0]


class Predictor(ABC):
    """A policy with a static batch, whatever runs its graph: frames and instructions in, action chunks out."""

    processor: Processor
    """Host-side tokenizer, image preparation and action statistics."""
    config: CompileConfig
    """Settings of the compilation."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of the noise that the graph takes, (B, A, F)."""

    @abstractmethod
    def sample(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        """Return raw samples float32 [B,A,F]."""

    def predict_action(
        self,
        image: CameraFrame | Sequence[CameraFrame],
        instruction: str | Sequence[str],
        unnorm_key: str | None = None,
        noise: NDArray[np.floating] | None = None,
        seed: int | None = None,
        *,
        framing: Framing = "whole",
    ) -> NDArray[np.float64]:
        """Return the action chunk for a camera frame and an instruction.

        Args:
            image: a PIL image of mode RGB or uint8 [H,W,3]; for a batch, a sequence of B of them or uint8 [B,H,W,3].
            instruction: what the robot shall do; for a batch, a sequence of B of them.
            unnorm_key: name of the dataset whose statistics scale the actions; None where only one is known.
            noise: float array [A,F] or [B,A,F] from which the sampler starts; None draws it from `seed`.
            seed: whole number from 0 up; None without `noise` means 0, the same noise in every call.
            framing: "whole" squashes the whole frame to the policy's square; "deploy" cuts it first as CogACT's server
                for real robots does; see `evla_compile.camera_frame.Framing` for when.

        Returns:
            Actions float64 [A,F] for a single frame, [B,A,F] for a batch.

        Raises:
            ValueError: an argument is refused, or the samples are not finite.
        """
        _, chunk, width = self.noise_shape
        return predict_action(
            self.sample,
            self.processor,
            image,
            instruction,
            unnorm_key=unnorm_key,
            noise=noise,
            seed=seed,
            text_tokens=self.config.text_tokens,
            batch_size=self.config.batch_size,
            chunk=chunk,
            width=width,
            framing=framing,
        )
