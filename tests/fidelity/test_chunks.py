"""Recording action chunks: every frame and draw at its place, whatever the batch, and a file that comes back whole."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.errors import CalibrationError, EvlaError
from evla_compile.fidelity.chunks import ActionChunks, count_calls, digest_frames, frame_noise, sample_chunks
from evla_compile.host.frames import Frame
from evla_compile.host.inputs import InputSignature
from evla_compile.host.predictor import Predictor
from evla_compile.host.processor import Processor

WORDS = ("go", "stop", "turn it off")


class Echo(Predictor):
    """Returns its noise plus the red of the frame's first pixel and ten times the length of the prompt."""

    def __init__(self, processor: Processor, batch_size: int) -> None:
        self.processor = processor
        self.calls = 0
        self._batch = batch_size

    @property
    def signature(self) -> InputSignature:
        return InputSignature(
            batch_size=self._batch, image_side=56, text_tokens=26, chunk=5, action_width=7, vocabulary=64
        )

    def sample(
        self,
        image: NDArray[np.uint8],
        input_ids: NDArray[np.int64],
        text_length: NDArray[np.int64],
        noise: NDArray[np.float32],
    ) -> NDArray[np.float32]:
        del input_ids
        self.calls += 1
        return (noise + image[:, 0, 0, 0, None, None] + 10 * text_length[:, None, None]).astype(np.float32)


@pytest.fixture
def processor(tokenizer_json: str) -> Processor:
    return Processor(tokenizer_json=tokenizer_json, statistics={}, image_side=56, pad_id=0)


@pytest.fixture
def frames() -> list[Frame]:
    return [Frame(np.full((56, 56, 3), shade, dtype=np.uint8), WORDS[shade % 3]) for shade in range(7)]


@pytest.mark.parametrize("batch_size", [1, 2, 4, 32])
def test_every_frame_and_draw_is_at_its_place(batch_size: int, processor: Processor, frames: list[Frame]) -> None:
    policy, ticks = Echo(processor, batch_size), list[None]()
    found = sample_chunks(policy, frames, 3, lambda: ticks.append(None))
    assert found.samples.shape == (3, 7, 5, 7)
    for place, frame in enumerate(frames):
        length = len(processor.prompt_ids(frame.instruction))
        expected = frame_noise(place, 3, (5, 7)) + place + 10 * length
        np.testing.assert_array_equal(found.samples[:, place], expected.astype(np.float32))
    assert len(ticks) == policy.calls == count_calls(7, 3, batch_size)


def test_noises_differ_by_frame_and_draw_and_more_draws_begin_with_the_same() -> None:
    noise = np.stack([frame_noise(place, 3, (5, 7)) for place in range(4)]).reshape(12, 35)
    assert len({row.tobytes() for row in noise}) == 12
    np.testing.assert_array_equal(frame_noise(2, 3, (5, 7))[:2], frame_noise(2, 2, (5, 7)))


def test_a_file_comes_back(tmp_path: Path, processor: Processor, frames: list[Frame]) -> None:
    chunks = sample_chunks(Echo(processor, 2), frames, 2)
    chunks.save(tmp_path / "dense.npz")
    found = ActionChunks.load(tmp_path / "dense.npz")
    np.testing.assert_array_equal(found.samples, chunks.samples)
    assert found.frames == chunks.frames == digest_frames(processor, frames)
    assert [file.name for file in tmp_path.iterdir()] == ["dense.npz"]


def test_the_digest_is_of_pixels_words_and_order(processor: Processor, frames: list[Frame]) -> None:
    other_words = [Frame(frames[0].image, "turn it off"), *frames[1:]]
    other_pixels = [Frame(np.full((56, 56, 3), 9, dtype=np.uint8), "go"), *frames[1:]]
    digests = {
        digest_frames(processor, each) for each in (frames, other_words, other_pixels, frames[::-1], frames[:-1])
    }
    assert len(digests) == 5
    episodes = [Frame(frame.image, frame.instruction, "e") for frame in frames]
    assert digest_frames(processor, episodes) == digest_frames(processor, frames)


@pytest.mark.parametrize("draws", [0, 65, 1.0, True])
def test_a_number_of_draws_out_of_range_is_refused(draws: Any, processor: Processor, frames: list[Frame]) -> None:
    with pytest.raises(ValueError, match=r"draws=.*from 1 to 64"):
        sample_chunks(Echo(processor, 1), frames, draws)


def test_no_frames_are_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match="at least one"):
        sample_chunks(Echo(processor, 1), [])


def test_samples_that_are_not_finite_are_refused(processor: Processor, frames: list[Frame]) -> None:
    chunks = sample_chunks(Echo(processor, 1), frames, 2)
    samples = chunks.samples.copy()
    samples[1, 3, 0, 0] = np.nan
    samples[0, 5, 0, 0] = np.inf
    with pytest.raises(EvlaError, match="on 2 of 7 frames are not finite"):
        replace(chunks, samples=samples)


@pytest.mark.parametrize(
    "content",
    [
        {"samples": np.zeros((2, 3, 5, 7), dtype=np.float32)},
        {"samples": np.zeros((2, 3, 5, 7)), "about": np.frombuffer(b'{"format":1,"frames":"x"}', dtype=np.uint8)},
        {"samples": np.zeros((2, 3), dtype=np.float32), "about": np.frombuffer(b'{"format":1,"frames":"x"}', np.uint8)},
        {"samples": np.zeros((2, 3, 5, 7), dtype=np.float32), "about": np.frombuffer(b"[]", dtype=np.uint8)},
        {"samples": np.zeros((2, 3, 5, 7), dtype=np.float32), "about": np.frombuffer(b'{"format":2}', dtype=np.uint8)},
        {"samples": np.zeros((2, 3, 5, 7), dtype=np.float32), "about": np.frombuffer(b"{", dtype=np.uint8)},
        {"samples": np.array([None, {}], dtype=object), "about": np.frombuffer(b"{}", dtype=np.uint8)},
    ],
)
def test_another_file_is_one_error(content: dict[str, NDArray[Any]], tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", **content)  # type: ignore[arg-type]  # numpy's stub mixes up its flag and the arrays
    with pytest.raises(CalibrationError, match=r"cannot be read.*evla fidelity --record"):
        ActionChunks.load(tmp_path / "x.npz")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"\x80\x04pickle", None])
def test_a_broken_or_missing_file_is_one_error(content: bytes | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read"):
        ActionChunks.load(tmp_path / "x.npz")


def test_a_file_of_another_kind_is_not_written(tmp_path: Path, processor: Processor, frames: list[Frame]) -> None:
    with pytest.raises(ValueError, match=r"ends in \.npz"):
        sample_chunks(Echo(processor, 1), frames, 2).save(tmp_path / "dense.json")
    assert not list(tmp_path.iterdir())
