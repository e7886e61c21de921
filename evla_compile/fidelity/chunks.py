"""Action chunks of a policy on recorded frames, from several noises each, and the file that they are kept in; no torch.

Shape legend: R draws of noise, F frames, B batch, A action steps, W action dimensions.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from evla_compile.arguments import is_whole
from evla_compile.errors import CalibrationError, EvlaError
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import GraphInputs, draw_noise
from evla_compile.host.predictor import Predictor
from evla_compile.host.processor import Processor
from evla_compile.json_text import to_json_text
from evla_compile.scratch import replacing

DRAWS = 2
"""Noises that a frame is run from: the fewest that tell how far noise alone moves the actions."""
MAX_DRAWS = 64
"""Most of them."""

SUFFIX = ".npz"
"""How the name of a file of chunks ends."""

_FORMAT = 1


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ActionChunks:
    """What a policy does on some frames."""

    samples: NDArray[np.float32]
    """Raw samples [R,F,A,W]; the noise of a draw and a frame is `frame_noise`'s."""
    frames: str
    """Digest of the frames as the policy sees them; see `digest_frames`."""

    def __post_init__(self) -> None:
        shape = self.samples.shape
        if len(shape) != 4 or 0 in shape or self.samples.dtype != np.float32:
            raise ValueError(f"samples are {self.samples.dtype}{list(shape)}: expected float32 [R,F,A,W]")
        if not np.isfinite(self.samples).all():
            count = np.count_nonzero(~np.isfinite(self.samples).all(axis=(0, 2, 3)))
            raise EvlaError(f"the samples on {count} of {shape[1]} frames are not finite: check the policy with verify")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the chunks to an `.npz` file, whole or not at all.

        Raises:
            ValueError: the file does not end in .npz.
        """
        place = Path(path)
        if place.suffix != SUFFIX:
            raise ValueError(f"{place}: expected a file that ends in {SUFFIX}")
        about = to_json_text({"format": _FORMAT, "frames": self.frames}).encode()
        with replacing(place) as new, new.open("wb") as file:
            np.savez(file, samples=self.samples, about=np.frombuffer(about, dtype=np.uint8))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read `save`'s file.

        Raises:
            CalibrationError: it is missing or no such file.
        """
        expected = "a file of `evla fidelity --record`"
        try:
            with Path(path).open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                samples, about = file["samples"], json.loads(file["about"].tobytes())
            if not isinstance(about, dict) or about.get("format") != _FORMAT or not isinstance(about["frames"], str):
                raise ValueError(f"it says {about!s:.80}, expected format {_FORMAT}")
            return cls(samples=samples, frames=about["frames"])
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, BadZipFile) as error:
            raise CalibrationError(f"{path} cannot be read ({error}): expected {expected}") from error


def frame_noise(place: int, draws: int, shape: tuple[int, int]) -> NDArray[np.float32]:
    """Return the noises float32 [R,A,W] of a frame, by its place; the first of more draws are those of fewer."""
    return draw_noise((draws, *shape), place)


def digest_frames(processor: Processor, frames: Sequence[Frame]) -> str:
    """Return a digest of observations as a policy sees them: squashed pixels and token ids."""
    digest = hashlib.sha256()
    for image, instruction in frames:
        pixels, ids = processor.image(image), processor.prompt_ids(instruction)
        digest.update(to_json_text([list(pixels.shape), ids]).encode())
        digest.update(pixels.tobytes())
    return digest.hexdigest()


def sample_chunks(
    policy: Predictor, frames: Sequence[Frame], draws: int = DRAWS, tick: Callable[[], object] = lambda: None
) -> ActionChunks:
    """Run a policy on frames, each from several noises.

    Args:
        policy: a compiled policy on any backend. Its batches are filled with different frames and draws.
        frames: observations.
        draws: noises of each frame.
        tick: called behind every call of the policy, as often as `count_calls` says.

    Raises:
        ValueError: there are no frames, `draws` is out of range, or the policy refuses a frame.
        EvlaError: a sample is not finite.
    """
    check_draws(draws, frames)
    signature = policy.signature
    size, shape = signature.batch_size, (signature.chunk, signature.action_width)
    found = np.empty((draws, len(frames), *shape), dtype=np.float32)
    for rows in _batches(len(frames), draws, size):
        filled = (rows * size)[:size] if len(rows) < size else rows
        inputs = GraphInputs.prepare(
            policy.processor,
            [frames[place].image for place, _ in filled],
            [frames[place].instruction for place, _ in filled],
            signature,
            noise=np.stack([frame_noise(place, draws, shape)[draw] for place, draw in filled]),
        )
        samples = policy.sample(*inputs.arrays)  # [B,A,W]
        for row, (place, draw) in enumerate(rows):
            found[draw, place] = samples[row]
        tick()
    return ActionChunks(samples=found, frames=digest_frames(policy.processor, frames))


def count_calls(frames: int, draws: int, batch_size: int) -> int:
    """Return how many calls of a policy `sample_chunks` makes."""
    return -(-frames * draws // batch_size)


def check_draws(draws: Any, frames: Sequence[Frame]) -> None:
    """Refuse a number of draws out of range, and no frames at all.

    Raises:
        ValueError: the message says what was expected.
    """
    if not is_whole(draws) or not 1 <= draws <= MAX_DRAWS:
        raise ValueError(f"draws={draws!r}: expected a whole number from 1 to {MAX_DRAWS}")
    if not frames:
        raise ValueError("no frames to compare policies on: expected at least one")


def _batches(frames: int, draws: int, size: int) -> Iterator[list[tuple[int, int]]]:
    """Yield all frames with all draws, so many at a time."""
    rows = [(place, draw) for place in range(frames) for draw in range(draws)]
    for first in range(0, len(rows), size):
        yield rows[first : first + size]
