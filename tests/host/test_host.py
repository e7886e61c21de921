"""Between a camera frame and an action chunk, with a function of a few lines for a backend."""

import json
import struct
import zlib
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.host.camera_frame import fit
from evla_compile.host.image_file import read_image
from evla_compile.host.inputs import GraphInputs, InputSignature, action_noise, draw_noise, observations
from evla_compile.host.predictor import predict_action
from evla_compile.host.processor import Processor, read_statistics
from evla_compile.settings.anatomy import COGACT

SIDE, TEXT, CHUNK, WIDTH, PAD = 28, 20, 16, 7, 3
UNNORM_KEY = "bridge_orig"


@pytest.fixture(scope="module")
def processor(tokenizer_json: str, golden_dir: Path) -> Processor:
    statistics = read_statistics(json.loads((golden_dir / "dataset_statistics.json").read_text(encoding="utf-8")))
    return Processor(tokenizer_json=tokenizer_json, statistics=statistics, image_side=SIDE, pad_id=PAD)


class Backend:
    """A backend that keeps what it was given and returns the noise, shifted, as its samples."""

    def __init__(self, shift: float = 0.25) -> None:
        self.shift = np.float32(shift)
        self.calls: list[GraphInputs] = []

    def __call__(self, inputs: GraphInputs) -> NDArray[np.float32]:
        self.calls.append(inputs)
        return inputs.noise + self.shift


def signature(batch_size: int = 1) -> InputSignature:
    return InputSignature(
        batch_size=batch_size, image_side=SIDE, text_tokens=TEXT, chunk=CHUNK, action_width=WIDTH, vocabulary=32000
    )


def prepare(processor: Processor, image: Any, instruction: Any, batch_size: int = 1, **noise: Any) -> GraphInputs:
    return GraphInputs.prepare(processor, image, instruction, signature(batch_size), **noise)


def frame(value: int) -> NDArray[np.uint8]:
    return np.full((6, 8, 3), value, dtype=np.uint8)


def predict(backend: Backend, processor: Processor, image: Any, instruction: Any, **settings: Any) -> NDArray[Any]:
    defaults: dict[str, Any] = {"unnorm_key": UNNORM_KEY, "noise": None, "seed": None}
    form = signature(settings.pop("batch_size", 1))
    return predict_action(backend, processor, image, instruction, form, **(defaults | settings))


def test_one_frame_and_one_instruction_become_a_batch_of_one(processor: Processor) -> None:
    inputs = prepare(processor, frame(9), "pick coke can", batch_size=1)
    ids = processor.prompt_ids("pick coke can")
    assert np.array_equal(inputs.image, np.full((1, SIDE, SIDE, 3), 9))
    assert inputs.input_ids.tolist() == [ids + [PAD] * (TEXT - len(ids))]
    assert inputs.text_length.tolist() == [len(ids)]
    assert [array.dtype for array in (inputs.image, inputs.input_ids, inputs.text_length)] == [
        np.uint8,
        np.int64,
        np.int64,
    ]


def test_inputs_have_the_forms_of_the_signature_in_the_order_of_the_graph(processor: Processor) -> None:
    inputs = prepare(processor, [frame(1), frame(2)], ["a", "b"], batch_size=2)
    assert COGACT.input_names == tuple(field.name for field in fields(GraphInputs))
    assert list(inputs.by_name) == ["image", "input_ids", "text_length", "noise"]
    for form, array, given in zip(COGACT.inputs, inputs.arrays, inputs.by_name.values(), strict=True):
        assert given is array
        assert (array.dtype, array.shape) == (form.dtype, signature(2).shapes[form.name])
    assert [array.shape for array in inputs.arrays] == [(2, SIDE, SIDE, 3), (2, TEXT), (2,), (2, CHUNK, WIDTH)]
    inputs.check(signature(2))


def test_blank_inputs_have_the_form_and_the_shortest_text() -> None:
    inputs = GraphInputs.blank(signature(2))
    inputs.check(signature(2))
    assert inputs.text_length.tolist() == [2, 2]
    assert not any(array.any() for array in (inputs.image, inputs.input_ids, inputs.noise))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"image": np.zeros((2, SIDE, SIDE), np.uint8)}, r"image is uint8\[2, 28, 28\]: .*uint8\[2, 28, 28, 3\]"),
        ({"input_ids": np.zeros((2, TEXT), np.int32)}, r"input_ids is int32\[2, 20\]: expected .*int64\[2, 20\]"),
        ({"noise": [0.0]}, r"noise is list: expected a numpy array float32\[2, 16, 7\]"),
        ({"input_ids": np.full((2, TEXT), 32000)}, "input_ids has ids from 32000 to 32000: expected from 0 to 31999"),
        ({"input_ids": np.full((2, TEXT), -1)}, "input_ids has ids from -1 to -1: expected from 0 to 31999"),
        ({"text_length": np.array([2, 1])}, r"text_length=\[2, 1\]: expected from 2 to 20"),
        ({"text_length": np.array([21, 20])}, r"text_length=\[21, 20\]: expected from 2 to 20"),
    ],
)
def test_inputs_that_a_graph_does_not_take_are_refused(changed: dict[str, Any], message: str) -> None:
    inputs = replace(GraphInputs.blank(signature(2)), **changed)
    with pytest.raises(ValueError, match=message):
        inputs.check(signature(2))


def test_rows_of_a_batch_keep_their_order(processor: Processor) -> None:
    inputs = prepare(processor, [frame(1), frame(2)], ["open drawer", "pick it up"], batch_size=2)
    assert inputs.image[:, 0, 0, 0].tolist() == [1, 2]
    rows = zip(inputs.input_ids, inputs.text_length, strict=True)
    prompts = [processor.prompt_ids(text) for text in ("open drawer", "pick it up")]
    assert [row[:length].tolist() for row, length in rows] == prompts


@pytest.mark.parametrize(
    ("image", "instruction", "batch_size", "message"),
    [
        (frame(1), ["a", "b"], 2, "image: 1 given.* batches of 2"),
        ([frame(1), frame(2)], "a", 2, "instruction: 1 given.* batches of 2"),
        ([frame(1), frame(2)], "a", 1, "image: 2 given.* batches of 1"),
        (frame(1), ["a", "b", "c"], 1, "instruction: 3 given.* batches of 1"),
        ([], "a", 1, "image: 0 given"),
        (frame(1), None, 1, "instruction=None"),
        (frame(1)[..., 0], "a", 1, r"expected uint8 \[H,W,3\]"),
        (np.zeros((2, 6, 8, 3), np.uint8), "a", 1, "image: 2 given.* batches of 1"),
        (np.zeros((2, 6, 8, 3), np.float32), ["a", "b"], 2, r"array of float32 \[6, 8, 3\]: expected uint8"),
        (np.zeros((1, 2, 6, 8, 3), np.uint8), "a", 1, r"array of uint8 \[1, 2, 6, 8, 3\]: expected uint8"),
        ("frame.png", "a", 1, r"image is a str, 'frame.png': expected a PIL image .*image_file.read_image\(path\)"),
        (Path("frame.png"), "a", 1, r"image is a PosixPath, PosixPath\('frame.png'\).*image_file.read_image\(path\)"),
        (["frame.png", "a.png"], ["a", "b"], 2, r"image is a str, 'frame.png'.*image_file.read_image\(path\)"),
        (b"\x89PNG\r", "a", 1, r"image is a bytes of 5: .*PIL.Image.open\(io.BytesIO\(data\)\)"),
        (b"\x89PNG\r", "a", 5, "image is a bytes of 5"),
        (bytearray(3), "a", 1, "image is a bytearray of 3"),
        ((frame(value) for value in (1, 2)), ["a", "b"], 2, "image is a generator"),
        (frame(1), b"a", 1, r"instruction=b'a': expected a text .*instruction.decode\('utf-8'\)"),
        (frame(1), [b"a"], 1, r"instruction=b'a': expected a text .*instruction.decode\('utf-8'\)"),
        (frame(1), b"pick", 4, r"instruction=b'pick': expected a text"),
        (frame(1), "pick \udce4", 1, r"instruction='pick \\udce4' holds '\\udce4', half of a character"),
        (frame(1), "\ud83d", 1, r"instruction='\\ud83d' holds '\\ud83d', half of a character"),
        (frame(1), "pick " * 30, 1, "text_tokens"),
    ],
)
def test_other_numbers_or_kinds_of_frames_and_instructions_are_refused(
    processor: Processor, image: Any, instruction: Any, batch_size: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(processor, image, instruction, batch_size=batch_size)


@pytest.mark.parametrize(("seed", "drawn"), [(None, 0), (0, 0), (7, 7), (np.int64(7), 7), (np.uint8(7), 7)])
def test_noise_is_drawn_from_the_seed_which_is_0_by_default(seed: int | None, drawn: int) -> None:
    noise = action_noise(None, seed, (2, CHUNK, WIDTH))
    assert noise.dtype == np.float32
    assert np.array_equal(noise, draw_noise((2, CHUNK, WIDTH), drawn))


def test_different_seeds_give_different_noise() -> None:
    first, second = (action_noise(None, seed, (1, CHUNK, WIDTH)) for seed in (1, 2))
    assert not np.array_equal(first, second)


@pytest.mark.parametrize("shape", [(CHUNK, WIDTH), (1, CHUNK, WIDTH)])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_given_noise_is_used_as_it_is(shape: tuple[int, ...], dtype: type[np.floating[Any]]) -> None:
    given = np.random.default_rng(0).standard_normal(shape).astype(dtype)
    noise = action_noise(given, None, (1, CHUNK, WIDTH))
    assert noise.dtype == np.float32
    assert np.array_equal(noise, given.astype(np.float32).reshape(1, CHUNK, WIDTH))


@pytest.mark.parametrize(
    ("noise", "seed", "batch_size", "message"),
    [
        (np.zeros((CHUNK, WIDTH)), 0, 1, "both given"),
        (np.zeros((CHUNK, WIDTH)), None, 2, r"expected \[2, 16, 7\]"),
        (np.zeros((2, CHUNK, WIDTH)), None, 1, r"shape \[2, 16, 7\]: expected \[1, 16, 7\]"),
        (np.zeros((WIDTH, CHUNK)), None, 1, r"shape \[7, 16\]"),
        (np.zeros((CHUNK, WIDTH), dtype=np.int64), None, 1, "noise is of int64: expected a float array"),
        ([[0.0] * WIDTH] * CHUNK, None, 1, "noise is of list"),
        (np.full((CHUNK, WIDTH), np.nan), None, 1, "not a number"),
        (np.full((CHUNK, WIDTH), np.inf), None, 1, "infinite"),
        (np.full((CHUNK, WIDTH), 1e300), None, 1, "infinite"),
        (None, -1, 1, "seed=-1"),
        (None, True, 1, "seed=True"),
        (None, 1.5, 1, "seed=1.5"),
        (None, np.True_, 1, "seed=.*: expected a whole number from 0 up"),
        (None, np.float64(1.0), 1, "seed=.*: expected a whole number from 0 up"),
        (None, "1", 1, "seed='1': expected a whole number from 0 up"),
        (None, np.array([1]), 1, "seed=.*: expected a whole number from 0 up"),
    ],
)
def test_unusable_noise_or_seed_is_refused(noise: Any, seed: Any, batch_size: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        action_noise(noise, seed, (batch_size, CHUNK, WIDTH))


def test_the_backend_gets_what_was_prepared_and_its_samples_become_actions(processor: Processor) -> None:
    backend = Backend()
    actions = predict(backend, processor, frame(5), "open drawer", seed=3)
    expected = prepare(processor, frame(5), "open drawer", seed=3)
    assert np.array_equal(expected.noise, draw_noise((1, CHUNK, WIDTH), 3))
    (given,) = backend.calls
    for array, wanted in zip(given.arrays, expected.arrays, strict=True):
        np.testing.assert_array_equal(array, wanted)
    assert np.array_equal(actions, processor.actions(expected.noise[0] + backend.shift, UNNORM_KEY))


@pytest.mark.parametrize(
    ("image", "instruction", "batch_size", "shape"),
    [
        (frame(1), "a", 1, (CHUNK, WIDTH)),
        ([frame(1)], ["a"], 1, (1, CHUNK, WIDTH)),
        ([frame(1), frame(2)], ["a", "b"], 2, (2, CHUNK, WIDTH)),
        (np.stack([frame(1), frame(2)]), ["a", "b"], 2, (2, CHUNK, WIDTH)),
        (np.stack([frame(1), frame(2)]), np.array(["a", "b"]), 2, (2, CHUNK, WIDTH)),
        (frame(1)[None], "a", 1, (1, CHUNK, WIDTH)),
    ],
)
def test_a_single_frame_gives_a_chunk_and_a_sequence_gives_a_batch(
    processor: Processor, image: Any, instruction: Any, batch_size: int, shape: tuple[int, ...]
) -> None:
    assert predict(Backend(), processor, image, instruction, batch_size=batch_size).shape == shape


def test_an_array_of_frames_is_a_batch_of_them(processor: Processor) -> None:
    frames = [frame(1), frame(2)]
    listed, stacked = (prepare(processor, images, ["a", "b"], batch_size=2) for images in (frames, np.stack(frames)))
    assert stacked.image[:, 0, 0, 0].tolist() == [1, 2]
    np.testing.assert_array_equal(stacked.image, listed.image, strict=True)


@pytest.mark.parametrize(
    "key", [[UNNORM_KEY], (UNNORM_KEY,), {UNNORM_KEY: 1}, b"bridge_orig", 0, np.array([UNNORM_KEY])]
)
def test_a_dataset_that_is_no_text_is_refused_before_the_backend_runs(processor: Processor, key: Any) -> None:
    backend = Backend()
    with pytest.raises(
        ValueError, match=r"unnorm_key=.*: expected one dataset for the whole batch, one of bridge_orig"
    ):
        predict(backend, processor, frame(1), "a", unnorm_key=key)
    assert not backend.calls


def test_the_framing_reaches_the_pixels(processor: Processor) -> None:
    backend, noisy = Backend(), np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    for settings in ({}, {"framing": "whole"}, {"framing": "deploy"}):
        predict(backend, processor, noisy, "a", **settings)
    default, whole, deployed = (call.image[0] for call in backend.calls)
    np.testing.assert_array_equal(default, fit(noisy, SIDE))
    np.testing.assert_array_equal(whole, default)
    np.testing.assert_array_equal(deployed, fit(noisy, SIDE, "deploy"))
    assert not np.array_equal(deployed, default)
    with pytest.raises(ValueError, match="framing='crop': expected one of whole, deploy"):
        predict(backend, processor, noisy, "a", framing="crop")


def test_a_frame_that_was_cut_before_stays_as_it_is(processor: Processor) -> None:
    noisy = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    cut = processor.image(noisy, "deploy")
    np.testing.assert_array_equal(processor.image(cut), cut)


def test_an_unknown_dataset_is_refused_before_the_backend_runs(processor: Processor) -> None:
    backend = Backend()
    with pytest.raises(ValueError, match=r"unknown unnorm_key 'nowhere'.*bridge_orig, fractal20220817_data"):
        predict(backend, processor, frame(1), "a", unnorm_key="nowhere")
    assert not backend.calls


def test_samples_that_are_not_finite_are_refused(processor: Processor) -> None:
    with pytest.raises(ValueError, match="not finite"):
        predict(Backend(shift=float("nan")), processor, frame(1), "a")


def test_a_16_bit_image_is_refused_even_where_pillow_opens_it_as_rgb(tmp_path: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress((b"\0" + bytes(12)) * 2))
    (tmp_path / "deep.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + pixels + chunk(b"IEND", b""))
    with pytest.raises(ValueError, match="16 bits a channel: expected 8"):
        read_image(tmp_path / "deep.png")


def test_rows_of_a_batch_hold_different_observations() -> None:
    frames = [(np.zeros((1, 1, 3), dtype=np.uint8), text) for text in "abc"]
    assert [[text for _, text in batch] for batch in observations(frames, 2)] == [["a", "b"], ["b", "c"], ["c", "a"]]
