"""The host's side of the policy against the golden cases, and every input that it refuses."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from evla_compile.errors import CheckpointError
from evla_compile.host.inputs import draw_noise
from evla_compile.host.processor import ActionStatistics, Processor, read_statistics

COKE_IDS = [1, 512, 29901, 1724, 3158, 881, 278, 19964, 2125, 304, 5839, 1302, 446, 508, 29973, 13, 3744, 29901, 29871]
COKE_IDS += [2]
STATISTICS = ActionStatistics(low=(-1.0,) * 6 + (0.0,), high=(3.0,) * 6 + (1.0,), mask=(True,) * 6 + (False,))


@pytest.fixture(scope="module")
def statistics(golden_dir: Path) -> dict[str, ActionStatistics]:
    return read_statistics(json.loads((golden_dir / "dataset_statistics.json").read_text()))


@pytest.fixture(scope="module")
def processor(tokenizer_json: str, statistics: dict[str, ActionStatistics]) -> Processor:
    return Processor(tokenizer_json=tokenizer_json, statistics=statistics, image_side=224)


def toy_tokenizer(vocabulary: dict[str, int], start: str | None = "<s>") -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if start is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{start} $A", special_tokens=[(start, vocabulary[start])]
        )
    return tokenizer


def toy_processor(
    tokenizer: Tokenizer,
    *,
    statistics: dict[str, ActionStatistics] | None = None,
    image_side: int = 14,
    pad_id: int = 0,
) -> Processor:
    return Processor(
        tokenizer_json=tokenizer.to_str(),
        statistics={"toy": STATISTICS} if statistics is None else statistics,
        image_side=image_side,
        pad_id=pad_id,
    )


@pytest.fixture(scope="module")
def toy() -> Processor:
    return toy_processor(toy_tokenizer({"<unk>": 0, "<s>": 1, "</s>": 2, "lift": 3}))


@pytest.mark.parametrize(
    ("tower", "mean_and_std"),
    [
        ("pixel_dino", [(0.485, 0.456, 0.406), (0.229, 0.224, 0.225)]),
        ("pixel_siglip", [(0.5, 0.5, 0.5), (0.5, 0.5, 0.5)]),
    ],
)
def test_normalised_pixels_equal_upstream_bit_by_bit(
    processor: Processor, frame: Image.Image, golden_dir: Path, tower: str, mean_and_std: list[tuple[float, ...]]
) -> None:
    mean, std = np.array(mean_and_std, np.float32)
    pixels = (processor.image(frame).astype(np.float32) / np.float32(255) - mean) / std
    with np.load(golden_dir / "case0.npz") as case:
        np.testing.assert_array_equal(pixels.transpose(2, 0, 1), case[tower], strict=True)


def test_array_gives_the_pixels_of_its_image(processor: Processor, frame: Image.Image) -> None:
    expected = processor.image(frame)
    blue_first = np.asarray(frame)[..., ::-1].copy()

    np.testing.assert_array_equal(processor.image(np.asarray(frame)), expected)
    np.testing.assert_array_equal(processor.image(blue_first[..., ::-1]), expected)


def test_wide_frame_is_squashed_and_not_cropped(processor: Processor) -> None:
    frame = np.zeros((480, 640, 3), np.uint8)
    frame[:, :40] = 255

    pixels = processor.image(frame)

    assert pixels.shape == (224, 224, 3)
    assert pixels.dtype == np.uint8
    assert (pixels[:, :12] == 255).all()
    assert (pixels[:, 16:] == 0).all()


def test_pixels_are_writable_even_at_the_final_size(toy: Processor) -> None:
    frame = np.full((14, 14, 3), 9, np.uint8)
    pixels = toy.image(frame)
    pixels[:] = 0
    assert (frame == 9).all()


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I", "F"])
def test_image_of_another_mode_is_refused_with_the_conversion(toy: Processor, mode: str) -> None:
    with pytest.raises(ValueError, match=rf"'{mode}'.*image\.convert\(\"RGB\"\)"):
        toy.image(Image.new(mode, (8, 8)))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.uint16),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((0, 8, 3), np.uint8),
        np.zeros((8, 0, 3), np.uint8),
    ],
    ids=lambda array: f"{array.dtype}{list(array.shape)}",
)
def test_array_of_another_kind_is_refused_with_its_dtype_and_shape(toy: Processor, array: NDArray[np.uint8]) -> None:
    with pytest.raises(ValueError, match=rf"array of {array.dtype} \[.*expected uint8 \[H,W,3\]"):
        toy.image(array)


@pytest.mark.parametrize("size", [(0, 8), (8, 0)])
def test_image_without_pixels_is_refused(toy: Processor, size: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]} pixels"):
        toy.image(Image.new("RGB", size))


@pytest.mark.parametrize("other", ["frame.png", None, [[0, 0, 0]]])
def test_what_is_no_image_is_refused(toy: Processor, other: Any) -> None:
    with pytest.raises(ValueError, match=f"the image is a {type(other).__name__}"):
        toy.image(other)


def test_prompt_ids_equal_upstream(processor: Processor, golden: dict[str, Any], golden_dir: Path) -> None:
    for case in golden["cases"]:
        with np.load(golden_dir / case["file"]) as arrays:
            assert processor.prompt_ids(case["instruction"]) == arrays["input_ids"][0].tolist()


def test_prompt_ids_of_pick_coke_can(processor: Processor) -> None:
    assert processor.prompt_ids("pick coke can") == COKE_IDS


def test_instruction_is_lower_cased_and_its_spaces_stay(processor: Processor) -> None:
    assert processor.prompt_ids("Pick COKE Can") == COKE_IDS
    # " ?" is one piece more than "?": upstream strips the whole prompt, in whose middle the instruction stands.
    assert processor.prompt_ids("pick coke can ") == [*COKE_IDS[:14], 1577, *COKE_IDS[15:]]


def test_braces_in_an_instruction_are_text(processor: Processor) -> None:
    assert len(processor.prompt_ids("pick {instruction} {0}")) > len(COKE_IDS)


@pytest.mark.parametrize(
    ("instruction", "length"),
    [
        ("put the spoon on the towel", 24),
        ("put carrot on plate", 21),
        ("stack the green block on the yellow block", 24),
        ("put eggplant into yellow basket", 22),
        ("pick coke can", 20),
        ("open top drawer", 20),
        ("close middle drawer", 20),
        ("open bottom drawer", 20),
        ("move sponge near apple", 22),
        ("move blue plastic bottle near orange", 24),
        ("move 7up can near redbull can", 26),
        ("place apple into top drawer", 22),
    ],
)
def test_text_is_padded_behind_its_real_length(processor: Processor, instruction: str, length: int) -> None:
    ids, real = processor.text(instruction, 32)

    assert real == length
    assert ids.dtype == np.int64
    assert ids.tolist() == processor.prompt_ids(instruction) + [32000] * (32 - length)


def test_text_may_fill_its_budget(processor: Processor) -> None:
    ids, real = processor.text("pick coke can", 20)
    assert (ids.tolist(), real) == (COKE_IDS, 20)


@pytest.mark.parametrize("budget", [20.0, True, "20", None])
def test_a_budget_that_is_no_whole_number_is_refused(processor: Processor, budget: Any) -> None:
    assert processor.text("pick coke can", np.int64(20))[1] == 20  # type: ignore[arg-type]  # numpy's, on purpose
    with pytest.raises(ValueError, match=f"budget={budget!r}: expected a whole number from 1 up"):
        processor.text("pick coke can", budget)


def test_text_over_its_budget_is_refused_with_both_numbers(processor: Processor) -> None:
    with pytest.raises(ValueError, match=r"'pick coke can' has 20 tokens, its budget is 19:.*text_tokens=20"):
        processor.text("pick coke can", 19)


def test_padding_takes_the_given_id() -> None:
    tokenizer = toy_tokenizer({"<unk>": 0, "<s>": 1, "</s>": 2})
    ids, real = toy_processor(tokenizer, pad_id=7).text("lift", 40)
    assert (ids[real:] == 7).all()


@pytest.mark.parametrize("instruction", ["", " ", "\t\n", None, b"lift", 3])
def test_empty_instruction_is_refused(toy: Processor, instruction: Any) -> None:
    with pytest.raises(ValueError, match="expected a text such as"):
        toy.prompt_ids(instruction)


@pytest.mark.parametrize("marker", ["<unk>", "<s>", "</s>", "</S>", "<PAD>", "<pad>", "<image>", "<Image>"])
def test_special_token_in_an_instruction_is_refused(processor: Processor, marker: str) -> None:
    with pytest.raises(ValueError, match=rf"contains '{marker.lower()}'"):
        processor.prompt_ids(f"pick{marker}can")


def test_settings_of_the_tokenizers_last_use_are_ignored() -> None:
    tokenizer = toy_tokenizer({"<unk>": 0, "<s>": 1, "</s>": 2, "lift": 3})
    plain = toy_processor(tokenizer).prompt_ids("lift")
    tokenizer.enable_truncation(4)
    assert toy_processor(tokenizer).prompt_ids("lift") == plain
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=64)
    assert toy_processor(tokenizer).prompt_ids("lift") == plain


@pytest.mark.parametrize(
    ("vocabulary", "start", "message"),
    [
        ({"<unk>": 0, "<s>": 1}, None, r"starts a text with the ids \[\]"),
        ({"<unk>": 0, "<s>": 5}, "<s>", r"starts a text with the ids \[5\]"),
        ({"<unk>": 0, "<s>": 1, "</s>": 3}, "<s>", "'</s>' the id 3, not 2"),
    ],
)
def test_tokenizer_that_numbers_otherwise_than_llama_2_is_refused(
    vocabulary: dict[str, int], start: str | None, message: str
) -> None:
    tokenizer = toy_tokenizer(vocabulary, start)
    with pytest.raises(CheckpointError, match=f"{message}.*Llama-2's tokenizer.json"):
        toy_processor(tokenizer)


def test_the_lone_word_boundary_is_the_tokenizers_own() -> None:
    tokenizer = toy_tokenizer({"<unk>": 0, "<s>": 1, "</s>": 2, "\u2581": 3, "lift": 4}, "<s>")
    processor = toy_processor(tokenizer)
    assert (processor.blank_id, processor.vocabulary) == (3, 5)
    assert processor.prompt_ids("lift")[-2:] == [3, 2]


def test_without_a_lone_word_boundary_the_id_is_llama_2s(toy: Processor) -> None:
    assert toy.blank_id == 29871
    assert toy.prompt_ids("lift")[-2:] == [29871, 2]


@pytest.mark.parametrize("text", ["", "{", "{}", "[1]"])
def test_damaged_tokenizer_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="tokenizer cannot be parsed"):
        Processor(tokenizer_json=text, statistics={}, image_side=224)


@pytest.mark.parametrize(
    ("image_side", "pad_id", "name"),
    [
        (0, 0, "image_side=0"),
        (224, -1, "pad_id=-1"),
        (True, 0, "image_side=True"),
        (14.0, 0, "image_side=14.0"),
        (14, 0.5, "pad_id=0.5"),
    ],
)
def test_sizes_out_of_range_are_refused(tokenizer_json: str, image_side: Any, pad_id: Any, name: str) -> None:
    with pytest.raises(ValueError, match=name):
        Processor(tokenizer_json=tokenizer_json, statistics={}, image_side=image_side, pad_id=pad_id)


def test_actions_equal_upstream(processor: Processor, golden: dict[str, Any], golden_dir: Path) -> None:
    for case in golden["cases"]:
        with np.load(golden_dir / case["file"]) as arrays:
            samples = arrays["samples"]
            actions = processor.actions(samples, case["unnorm_key"])

            np.testing.assert_allclose(actions[0], arrays["actions"], rtol=0, atol=1e-6, strict=True)
            np.testing.assert_array_equal(samples, arrays["samples"])


def test_samples_are_clipped_thresholded_and_scaled(toy: Processor) -> None:
    samples = np.array([[-5.0, -1.0, -0.5, 0.0, 1.0, 5.0, 0.5], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.49]])
    expected = [[-1.0, -1.0, 0.0, 1.0, 3.0, 3.0, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 0.0]]

    actions = toy.actions(samples)

    np.testing.assert_array_equal(actions, expected)
    np.testing.assert_array_equal(toy.actions(np.stack([samples, samples]), "toy"), [expected, expected])


def test_float64_samples_stay_as_they_are(toy: Processor) -> None:
    samples = np.full((16, 7), 2.0)
    toy.actions(samples)
    assert (samples == 2.0).all()


def test_gripper_inside_the_mask_is_scaled_after_its_threshold() -> None:
    tokenizer = toy_tokenizer({"<unk>": 0, "<s>": 1})
    scaled = ActionStatistics(low=(0.0,) * 7, high=(10.0,) * 7)
    actions = toy_processor(tokenizer, statistics={"toy": scaled}).actions(np.array([[0.0] * 7, [0.9] * 7]))
    np.testing.assert_array_equal(actions[:, 6], [5.0, 10.0])


@pytest.mark.parametrize("key", ["fractal", "", "Bridge_orig"])
def test_unknown_dataset_is_refused_with_the_known_ones(processor: Processor, key: str) -> None:
    with pytest.raises(ValueError, match=f"unknown unnorm_key '{key}': expected one of bridge_orig, fractal20220817_d"):
        processor.actions(np.zeros((16, 7)), key)


def test_dataset_must_be_named_where_there_are_several(processor: Processor) -> None:
    with pytest.raises(ValueError, match="unnorm_key is missing: expected one of bridge_orig, fractal20220817_data"):
        processor.actions(np.zeros((16, 7)))


@pytest.mark.parametrize("shape", [(7,), (16, 6), (16, 8), (7, 16)])
def test_samples_of_another_shape_are_refused(toy: Processor, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected \[...,A,7\]"):
        toy.actions(np.zeros(shape))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_finite_are_refused(toy: Processor, value: float) -> None:
    samples = np.zeros((16, 7), np.float32)
    samples[3, 2] = value
    with pytest.raises(ValueError, match="1 of 112 samples are not finite"):
        toy.actions(samples)


def test_the_largest_span_gives_finite_actions() -> None:
    largest = ActionStatistics(low=(-8.9e307,) * 7, high=(8.9e307,) * 7)
    processor = toy_processor(toy_tokenizer({"<unk>": 0, "<s>": 1}), statistics={"toy": largest})
    actions = processor.actions(np.array([[-1.0] * 7, [1.0] * 7]))
    np.testing.assert_allclose(actions, [[-8.9e307] * 6 + [0.0], [8.9e307] * 7])


@pytest.mark.parametrize("value", [1.7e308, float("inf"), float("nan")])
def test_actions_that_are_not_finite_are_refused_whatever_the_statistics_let_through(value: float) -> None:
    statistics = ActionStatistics(low=(-1.7e308,) * 7, high=(0.0,) * 7)
    object.__setattr__(statistics, "high", (0.0, value) + (0.0,) * 5)
    processor = toy_processor(toy_tokenizer({"<unk>": 0, "<s>": 1}), statistics={"toy": statistics})
    with pytest.raises(ValueError, match=r"2 of 14 actions are not finite after scaling"):
        processor.actions(np.ones((2, 7)))


def test_statistics_take_lists_and_arrays() -> None:
    given: Any = {"low": np.zeros(7, np.float32), "high": [1, *np.ones(6)], "mask": np.array([True] * 6 + [False])}
    found = ActionStatistics(**given)
    assert found == ActionStatistics(low=(0.0,) * 7, high=(1.0,) * 7, mask=(True,) * 6 + (False,))
    assert isinstance(hash(found), int)
    json.dumps(found.to_json(), allow_nan=False)
    wrong: Any = [{"low": "0000000"}, {"low": np.zeros((1, 7))}, {"mask": np.ones(7)}, {"mask": [1] * 7}]
    for change in wrong:
        with pytest.raises(ValueError, match="expected 7"):
            ActionStatistics(**(given | change))


def test_statistics_survive_json(statistics: dict[str, ActionStatistics]) -> None:
    text = json.dumps({dataset: entry.to_json() for dataset, entry in statistics.items()})
    assert read_statistics(json.loads(text)) == statistics
    assert statistics["bridge_orig"].low == (-0.0287, -0.0417, -0.0261, -0.0805, -0.0925, -0.2074, 0.0)
    assert statistics["bridge_orig"].mask == (True,) * 6 + (False,)


def test_absent_mask_maps_every_number() -> None:
    read = read_statistics({"toy": {"action": {"q01": [0] * 7, "q99": [1] * 7}}})
    assert read["toy"].mask == (True,) * 7


def damaged(change: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
    entry = STATISTICS.to_json()
    change(entry["action"])
    return {"fine": STATISTICS.to_json(), "damaged": entry}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "a key per dataset"),
        (["damaged"], "a key per dataset"),
        (None, "a key per dataset"),
        ({"damaged": {}}, "'damaged'.*'action'"),
        ({"damaged": None}, "'damaged'.*'action'"),
        ({"damaged": {"action": [1.0]}}, "'damaged'.*'action'"),
        (damaged(lambda action: action.pop("q01")), "'damaged'.*q01.*7 finite numbers"),
        (damaged(lambda action: action.pop("q99")), "'damaged'.*q99.*7 finite numbers"),
        (
            damaged(lambda action: action.update(q01=[-1.7e308] * 7, q99=[1.7e308] * 7)),
            r"'damaged'.*action number 0 spans from low \(q01\)=-1.7e\+308 to high \(q99\)=1.7e\+308",
        ),
        (
            damaged(lambda action: action.update(q01=[0] * 6 + [-(10**308)], q99=[0] * 6 + [10**308])),
            "'damaged'.*action number 6 spans",  # outside the mask, but nobody's percentiles
        ),
        (damaged(lambda action: action["q99"].pop()), "'damaged'.*q99.*7 finite numbers"),
        (damaged(lambda action: action.update(q01=0.5)), "'damaged'.*q01.*7 finite numbers"),
        (damaged(lambda action: action.update(q01=["0"] * 7)), "'damaged'.*q01.*7 finite numbers"),
        (damaged(lambda action: action.update(q01=[False] * 7)), "'damaged'.*q01.*7 finite numbers"),
        (damaged(lambda action: action.update(q99=[float("nan")] * 7)), "'damaged'.*q99.*7 finite numbers"),
        (damaged(lambda action: action.update(q99=[10**400] * 7)), "'damaged'.*q99.*7 finite numbers"),
        (damaged(lambda action: action.update(q99=[-2.0] * 7)), "'damaged'.*exceeds high"),
        (damaged(lambda action: action.update(mask=None)), "'damaged'.*mask.*7 booleans"),
        (damaged(lambda action: action.update(mask=[True] * 6)), "'damaged'.*mask.*7 booleans"),
        (damaged(lambda action: action.update(mask=[1] * 7)), "'damaged'.*mask.*7 booleans"),
    ],
)
def test_malformed_statistics_are_refused_by_dataset_and_key(data: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_statistics(data)


def test_noise_depends_on_its_seed_alone() -> None:
    noise = draw_noise((2, 16, 7), seed=1)

    assert noise.shape == (2, 16, 7)
    assert noise.dtype == np.float32
    np.testing.assert_array_equal(noise, draw_noise((2, 16, 7), seed=1))
    assert not np.array_equal(noise, draw_noise((2, 16, 7), seed=2))
    assert 0.8 < noise.std() < 1.2


def test_host_modules_import_neither_torch_nor_transformers() -> None:
    program = (
        "import sys, evla_compile.host.processor, evla_compile.host.simpler;"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
