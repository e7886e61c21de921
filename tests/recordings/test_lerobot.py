"""LeRobotDatasets: frames, episodes and instructions of formats 2 and 3, and one clear message for what is wrong."""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import evla_compile as evla
from evla_compile.errors import CalibrationError
from evla_compile.recordings import dataset_files, parquet_columns, source, video
from tests.recordings.written import (
    DEPTH,
    FPS,
    LENGTHS,
    TASKS,
    TOP,
    WRIST,
    assert_shows,
    change_table,
    feature,
    source_frame,
    source_frames,
    write_info,
    write_table,
    write_v3,
    write_v21,
    write_video,
)

DATA = "data/chunk-000/file-000.parquet"
EPISODES = "meta/episodes/chunk-000/file-000.parquet"
VIDEO = f"videos/{TOP}/chunk-000/file-000.mp4"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dataset of each kind."""
    folder = tmp_path_factory.mktemp("datasets")
    return {
        "v3": write_v3(folder / "v3"),
        "v3, two cameras": write_v3(folder / "cameras", cameras=(TOP, WRIST)),
        "v2.1": write_v21(folder / "v21"),
        "v2.1, images": write_v21(folder / "images", kind="image"),
    }


@pytest.fixture
def v3(written: dict[str, Path], tmp_path: Path) -> Path:
    """A dataset of version 3 to be spoiled."""
    shutil.copytree(written["v3"], tmp_path / "v3")
    return tmp_path / "v3"


@pytest.fixture
def v21(written: dict[str, Path], tmp_path: Path) -> Path:
    """A dataset of version 2.1 to be spoiled."""
    shutil.copytree(written["v2.1"], tmp_path / "v21")
    return tmp_path / "v21"


def refusal(folder: Path, **arguments: Any) -> str:
    with pytest.raises(CalibrationError) as refused:
        evla.read_recording(folder, **arguments)
    assert str(folder) in str(refused.value)
    return str(refused.value)


@pytest.mark.parametrize("kind", ["v3", "v2.1", "v2.1, images"])
def test_every_frame_is_the_one_that_was_recorded(written: dict[str, Path], kind: str) -> None:
    frames = evla.read_recording(written[kind])
    expected = [(episode, number) for episode in (0, 1) for number in range(LENGTHS[episode])]
    assert len(frames) == len(expected)
    for frame, (episode, number) in zip(frames, expected, strict=True):
        assert_shows(frame.image, source_frame(episode, number))
        assert (frame.instruction, frame.episode) == (TASKS[episode], str(episode))


@pytest.mark.parametrize("kind", ["v3", "v2.1", "v2.1, images"])
def test_episodes_and_every_choose_frames(written: dict[str, Path], kind: str) -> None:
    frames = evla.read_recording(written[kind], every=4, episodes=(1,))
    assert [frame.episode for frame in frames] == ["1"] * 3
    for frame, number in zip(frames, (0, 4, 8), strict=True):
        assert_shows(frame.image, source_frame(1, number))
    assert len(evla.read_recording(written[kind], every=4)) == 2 + 3  # counted anew in each episode


def test_images_in_parquet_files_are_exact(written: dict[str, Path]) -> None:
    frames = evla.read_recording(written["v2.1, images"], episodes=[0])
    for frame, expected in zip(frames, source_frames(0), strict=True):
        np.testing.assert_array_equal(np.asarray(frame.image), expected)


def test_an_image_of_a_file_beside_is_read(written: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(written["v2.1, images"], folder)
    file = folder / "data/chunk-000/episode_000000.parquet"
    kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    change_table(file, **{TOP: pa.array([{"bytes": None, "path": "frame.png"}] * LENGTHS[0], kind)})
    evla.read_recording(written["v2.1, images"])[0].image.save(folder / "frame.png")  # type: ignore[union-attr]
    assert_shows(evla.read_recording(folder, episodes=[0])[3].image, source_frame(0, 0))
    for cell, message in (
        ({"bytes": None, "path": "../frame.png"}, "expected a path inside"),
        ({"bytes": None, "path": None}, "expected bytes of an image, or the path of one"),
        ({"bytes": b"%!PS-Adobe-3.0 EPSF-3.0", "path": None}, r"unknown format"),
    ):
        change_table(file, **{TOP: pa.array([cell] * LENGTHS[0], kind)})
        assert message in refusal(folder)
        assert "row 0" in refusal(folder)


@pytest.mark.parametrize("batch", [1, 3, 16])
def test_rows_of_later_groups_and_batches_are_found(
    tmp_path: Path, written: dict[str, Path], monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(parquet_columns, "_BATCH", batch)
    file = written["v2.1, images"] / "data/chunk-001/episode_000001.parquet"
    pq.write_table(pq.read_table(file), tmp_path / "groups.parquet", row_group_size=4)
    found = parquet_columns.cells(tmp_path / "groups.parquet", TOP, np.array([1, 3, 4, 8]))
    assert [cell["path"] for cell in found] == ["1.png", "3.png", "4.png", "8.png"]


def test_an_instruction_takes_the_place_of_the_recorded_ones(v3: Path) -> None:
    (v3 / "meta/tasks.parquet").unlink()
    change_table(v3 / DATA, task_index=None)
    frames = evla.read_recording(v3, instruction="do it", every=5)
    assert {frame.instruction for frame in frames} == {"do it"}


@pytest.mark.parametrize("column", ["task", "__index_level_0__", "words"])
def test_the_text_of_tasks_may_be_the_index_of_pandas(v3: Path, column: str) -> None:
    write_table(v3 / "meta/tasks.parquet", {column: list(reversed(TASKS)), "task_index": [1, 0]})
    assert [frame.instruction for frame in evla.read_recording(v3, every=9)] == list(TASKS)


def test_each_camera_has_its_own_frames(written: dict[str, Path]) -> None:
    for camera in (TOP, WRIST):
        frames = evla.read_recording(written["v3, two cameras"], camera=camera, every=4, episodes=[1])
        assert_shows(frames[1].image, source_frame(1, 4, wrist=camera == WRIST))


def test_several_cameras_without_a_choice_are_listed(written: dict[str, Path]) -> None:
    message = refusal(written["v3, two cameras"])
    assert f"2 colour cameras, '{TOP}', '{WRIST}': choose one with --camera" in message


def test_an_unknown_camera_lists_those_there_are(written: dict[str, Path]) -> None:
    message = refusal(written["v3, two cameras"], camera="wrist")
    assert f"no camera 'wrist': expected one of its cameras, '{TOP}', '{WRIST}'" in message


@pytest.mark.parametrize(
    ("about", "message"),
    [
        (feature(depth=True), "is a depth map: expected colours"),
        (feature(channels=1), "has 1 channels: expected 3, red, green and blue"),
        (feature() | {"shape": [1, 48, 64], "names": ["channels", "height", "width"]}, "has 1 channels"),
        (feature() | {"shape": [48, 64], "names": None}, r"has shape [48, 64]"),
    ],
)
def test_depth_and_greyscale_cameras_are_refused(v3: Path, about: dict[str, Any], message: str) -> None:
    write_info(v3, features={TOP: feature(), DEPTH: about})
    found = refusal(v3, camera=DEPTH)
    assert message in found
    assert f"choose a colour camera: '{TOP}'" in found
    assert len(evla.read_recording(v3, every=9)) == 2  # the only colour camera needs no choice


def test_a_greyscale_video_is_refused_whatever_its_dataset_says(v3: Path) -> None:
    write_video(v3 / VIDEO, [frame for episode in (0, 1) for frame in source_frames(episode)], greyscale=True)
    assert "is greyscale or depth (gray)" in refusal(v3)


@pytest.mark.parametrize("text", ["", "  ", None])
def test_missing_task_texts_are_named(v3: Path, text: str | None) -> None:
    texts = [TASKS[0]] if text is None else [TASKS[0], text]
    write_table(v3 / "meta/tasks.parquet", {"task": texts, "task_index": list(range(len(texts)))})
    message = refusal(v3)
    assert "episode 1 has task 1, and the dataset's tasks have no text for it; give the task" in message
    assert "--instruction" in message
    assert len(evla.read_recording(v3, episodes=[0])) == LENGTHS[0]


def cut(file: Path, share: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


def test_a_file_that_is_no_video_cannot_be_decoded(v3: Path) -> None:
    cut(v3 / VIDEO)
    assert "file-000.mp4 cannot be decoded" in refusal(v3)


def test_other_formats_under_the_name_of_an_mp4_are_refused(v3: Path) -> None:
    # among those are playlists, which lead to other files and addresses
    write_video(v3 / VIDEO, source_frames(0) + source_frames(1), form="matroska")
    assert "file-000.mp4 cannot be decoded" in refusal(v3)


def test_a_video_that_is_too_short_says_where_it_ends(v3: Path) -> None:
    write_video(v3 / VIDEO, source_frames(0) + source_frames(1)[:4])
    message = refusal(v3)
    assert "has no frame at 1.000 s, where the dataset says that one is: the nearest one is at 0.900 s" in message


def test_a_frame_too_far_from_its_time_is_refused(v3: Path) -> None:
    write_video(v3 / VIDEO, source_frames(0) + source_frames(1), rate=FPS // 2)
    write_info(v3, fps=4 * FPS)  # now half a frame is 12.5 ms, and every second frame is 100 ms away
    assert "has no frame at 0.100 s" in refusal(v3)


def test_the_nearest_frame_is_taken(v3: Path) -> None:
    times = [number / FPS + 0.04 for number in range(LENGTHS[0])]
    for shift in (0.0, -0.08):
        found = list(video.frames_at(v3 / VIDEO, [max(time + shift, 0) for time in times], 0.5 / FPS))
        for image, expected in zip(found, source_frames(0), strict=True):
            assert_shows(image, expected)


def test_huge_frames_are_refused(v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video, "MOST_PIXELS", 1000)
    assert "has frames of 64 x 48 pixels: expected 1,000 at most" in refusal(v3)


@pytest.mark.parametrize("name", [VIDEO, DATA, "meta/tasks.parquet"])
def test_a_missing_file_is_named(v3: Path, name: str) -> None:
    (v3 / name).unlink()
    message = refusal(v3)
    assert str(v3 / name) in message
    assert "download the whole dataset" in message


def test_missing_episodes_are_named(v3: Path) -> None:
    assert "has no episode 2: it has 2 episodes, 0 to 1" in refusal(v3, episodes=[0, 2])
    (v3 / EPISODES).unlink()
    assert "has 0 parquet files" in refusal(v3)


@pytest.mark.parametrize("name", ["episodes", "tasks"])
def test_lists_of_format_2_are_checked(v21: Path, name: str) -> None:
    file = v21 / f"meta/{name}.jsonl"
    good = file.read_text(encoding="utf-8")
    for line, message in (("{", f"{file}:3 is not JSON"), ("[]", "expected a whole number from 0 up")):
        file.write_text(f"{good}{line}\n", encoding="utf-8")
        assert message in refusal(v21)
    file.unlink()
    assert f"{file} cannot be read" in refusal(v21)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "info.json is not JSON"),
        ("[" * 100_000, "info.json is not JSON"),
        ("[]", "holds a list: expected an object"),
        ('{"codebase_version": "v1.6"}', "codebase_version is 'v1.6', expected one of v2.0, v2.1, v3.0"),
        ('{"codebase_version": ["v3.0"]}', "codebase_version is ['v3.0']"),
    ],
)
def test_a_malformed_info_is_refused(v3: Path, text: str, message: str) -> None:
    (v3 / "meta/info.json").write_text(text, encoding="utf-8")
    assert message in refusal(v3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"fps": 0}, "fps is 0, expected a number in (0, 1000]"),
        ({"fps": "ten"}, "fps is 'ten'"),
        ({"chunks_size": 0}, "chunks_size is 0"),
        ({"data_path": None}, "data_path and video_path are no texts"),
        ({"video_path": None}, "video_path is missing"),
        ({"features": [1]}, "features is [1]"),
        ({"features": {}}, "has 0 colour cameras, none: expected one at least"),
        ({"features": {TOP: {"dtype": "video", "shape": "large", "names": 3}}}, "has 0 colour cameras"),
    ],
)
def test_malformed_fields_are_named(v3: Path, changes: dict[str, Any], message: str) -> None:
    write_info(v3, **changes)
    assert message in refusal(v3)


@pytest.mark.parametrize(
    "template",
    [
        "../outside/{chunk_index:03d}.parquet",
        "/etc/passwd",
        "data/{chunk_index:03d}/../../../x",
        "{chunk_index.__class__}",
        "{chunk_index!r}",
        "{chunk_index:0999999999d}",
        "{chunk_index:{file_index}}",
        "{0}",
        "{video_key}/x",
        "data/{chunk_index",
        "data/\x00",
        "",
    ],
)
def test_a_malicious_template_is_refused(v3: Path, template: str) -> None:
    write_info(v3, data_path=template)
    message = refusal(v3)
    assert "info.json: data_path" in message
    assert "expected a path" in message


def test_a_malicious_camera_key_stays_inside(v3: Path) -> None:
    key = "../../outside"
    write_info(v3, features={key: feature()})
    columns = {f"videos/{key}/{name}": [0, 0] for name in ("chunk_index", "file_index")}
    change_table(v3 / EPISODES, **columns, **{f"videos/{key}/from_timestamp": [0.0, 0.0]})
    assert "expected a path inside" in refusal(v3)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (EPISODES, {"data/chunk_index": [-1, 0]}, "numbers out of range"),
        (EPISODES, {"length": [6, 8]}, "has 9 rows of episode 1: expected 8"),
        (EPISODES, {"length": ["6", "9"]}, "column 'length' has type string: expected whole numbers"),
        (EPISODES, {f"videos/{TOP}/from_timestamp": [0.0, float("nan")]}, "numbers that are not finite"),
        (EPISODES, {f"videos/{TOP}/from_timestamp": [0.0, None]}, "is empty in 1 rows"),
        (EPISODES, {f"videos/{TOP}/file_index": None}, f"expected 'videos/{TOP}/file_index' once"),
        (DATA, {"timestamp": pa.array([0.0] * 15)}, "timestamp of episode 0 does not ascend from 0 up"),
        (DATA, {"task_index": None}, "expected 'task_index' once, with whole numbers"),
        ("meta/tasks.parquet", {"__index_level_0__": [1, 2]}, "expected texts in 'task', '__index_level_0__'"),
    ],
)
def test_malformed_tables_are_named(v3: Path, name: str, changes: dict[str, Any], message: str) -> None:
    change_table(v3 / name, **changes)
    found = refusal(v3)
    assert message in found
    assert Path(name).name in found


def test_a_table_that_is_cut_off_cannot_be_read(v3: Path) -> None:
    cut(v3 / DATA)
    assert "file-000.parquet cannot be read" in refusal(v3)


def test_texts_that_are_no_utf_8_are_refused(v3: Path) -> None:
    words = pa.array([b"\xff\xfe", b"go"]).view(pa.string())
    change_table(v3 / "meta/tasks.parquet", __index_level_0__=words)
    assert "tasks.parquet cannot be read" in refusal(v3)


@pytest.mark.parametrize("name", [VIDEO, DATA, EPISODES, "meta/tasks.parquet", "meta/info.json"])
def test_a_damaged_file_is_refused_or_read_and_never_crashes(v3: Path, name: str) -> None:
    good = (v3 / name).read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(15):
        spoiled = bytearray(good)
        for place in rng.integers(0, len(good), 4):
            spoiled[place] = rng.integers(0, 256)
        (v3 / name).write_bytes(spoiled)
        try:
            evla.read_recording(v3, every=5)
        except CalibrationError:
            refused += 1
    assert refused > 0


def test_large_tables_and_texts_are_refused(v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(parquet_columns, "MOST_ROWS", 14)
        assert "has 15 rows: expected 14 at most" in refusal(v3)
    monkeypatch.setattr(dataset_files, "MOST_TEXT_BYTES", 100)
    assert "expected 100 at most" in refusal(v3)


def test_more_frames_than_memory_are_refused(v3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MOST_FRAME_BYTES", 64 * 48 * 3 * 14)
    with pytest.raises(CalibrationError, match=r"15 frames of 64 x 48 pixels take .* take fewer with --every"):
        evla.read_recording(v3)
    assert len(evla.read_recording(v3, every=2)) == 8


@pytest.mark.parametrize("module", ["pyarrow", "pyarrow.parquet", "av"])
def test_a_missing_library_says_what_to_install(v3: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CalibrationError, match=r'needs .* pip install "evla-compile\[datasets\]"'):
        evla.read_recording(v3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"every": 0}, "every=0: expected a whole number from 1 up"),
        ({"episodes": ()}, r"episodes=\(\): expected indices"),
        ({"episodes": (0, "1")}, "expected indices"),
        ({"episodes": (-1,)}, "episodes=-1"),
        ({"camera": 3}, "camera=3: expected a text"),
        ({"instruction": " "}, "instruction=' '"),
    ],
)
def test_wrong_arguments_are_named(v3: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evla.read_recording(v3, **arguments)


def test_what_is_no_recording_is_refused(tmp_path: Path) -> None:
    assert "is no recording: expected a LeRobotDataset's folder" in refusal(tmp_path)
    assert "does not exist" in refusal(tmp_path / "absent")
    (tmp_path / "frames.jsonl").write_text(json.dumps({"image": "0.png", "instruction": "go"}), encoding="utf-8")
    assert "has a frames.jsonl already" in refusal(tmp_path)
