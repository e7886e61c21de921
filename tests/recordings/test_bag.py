"""MCAP bags of ROS 2: frames, topics and episodes, and one clear message for what is wrong."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import evla_compile as evla
from evla_compile.errors import CalibrationError
from evla_compile.recordings import bag as bags
from evla_compile.recordings import ros_image
from tests.recordings.written import (
    LENGTHS,
    assert_shows,
    compressed_message,
    foreign_bag,
    raw_bag,
    raw_message,
    source_frame,
    source_frames,
    write_bag,
)

RAW, COMPRESSED = "sensor_msgs/msg/Image", "sensor_msgs/msg/CompressedImage"
TASK = "pick up the apple"


def refusal(path: Path, **arguments: Any) -> str:
    with pytest.raises(CalibrationError) as refused:
        evla.read_recording(path, **{"instruction": TASK, **arguments})
    assert str(path) in str(refused.value)
    return str(refused.value)


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return raw_bag(tmp_path / "pick.mcap")


@pytest.mark.parametrize("encoding", ["rgb8", "bgr8", "rgba8", "bgra8"])
@pytest.mark.parametrize("padding", [0, 5])
def test_raw_images_are_exact(tmp_path: Path, encoding: str, padding: int) -> None:
    messages = [raw_message(frame, encoding, padding=padding) for frame in source_frames(1)]
    file = write_bag(tmp_path / "pick.mcap", {"/camera": (RAW, messages)})
    frames = evla.read_recording(file, instruction=TASK)
    assert len(frames) == LENGTHS[1]
    for frame, expected in zip(frames, source_frames(1), strict=True):
        np.testing.assert_array_equal(np.asarray(frame.image), expected)
        assert (frame.instruction, frame.episode) == (TASK, "pick")


def test_compressed_images_are_decoded(tmp_path: Path) -> None:
    messages = [compressed_message(frame) for frame in source_frames(0)]
    file = write_bag(tmp_path / "pick.mcap", {"/camera/compressed": (COMPRESSED, messages)})
    frames = evla.read_recording(file, instruction=TASK, every=2)
    assert len(frames) == 3
    for frame, number in zip(frames, (0, 2, 4), strict=True):
        np.testing.assert_array_equal(np.asarray(frame.image), source_frame(0, number))


def test_greyscale_images_need_a_word(tmp_path: Path) -> None:
    messages = [raw_message(frame, "mono8") for frame in source_frames(0)]
    file = write_bag(tmp_path / "pick.mcap", {"/camera": (RAW, messages)})
    assert "encoding mono8 is greyscale: expected colours" in refusal(file)
    frame, *_ = evla.read_recording(file, instruction=TASK, convert=True)
    np.testing.assert_array_equal(np.asarray(frame.image), source_frame(0, 0)[:, :, [0, 0, 0]])


def test_a_topic_is_chosen_among_several(tmp_path: Path) -> None:
    topics = {
        "/wrist": (RAW, [raw_message(source_frame(1, 0))]),
        "/top": (COMPRESSED, [compressed_message(source_frame(0, 0))]),
    }
    file = write_bag(tmp_path / "pick.mcap", topics)
    (frame,) = evla.read_recording(file, camera="/wrist", instruction=TASK)
    assert_shows(frame.image, source_frame(1, 0))
    assert "has 2 image topics, '/top', '/wrist', among '/chatter', '/top', '/wrist': choose one" in refusal(file)


def test_a_missing_topic_lists_those_there_are(one: Path) -> None:
    message = refusal(one, camera="/camera")
    assert "has no topic '/camera': expected one of its image topics, '/camera/image_raw'" in message
    message = refusal(one, camera="/chatter")
    assert "has messages of 'std_msgs/msg/String': expected sensor_msgs/msg/CompressedImage or sensor_msgs" in message


def test_a_bag_without_images_lists_its_topics(tmp_path: Path) -> None:
    file = write_bag(tmp_path / "talk.mcap", {})
    assert "has 0 image topics, none, among '/chatter': expected sensor_msgs" in refusal(file)


@pytest.mark.parametrize(
    ("schema", "encoding", "message_encoding", "expected"),
    [
        ("foxglove.CompressedImage", "jsonschema", "json", "'foxglove.CompressedImage in json'"),
        ("foxglove.CompressedImage", "protobuf", "protobuf", "'foxglove.CompressedImage in protobuf'"),
        ("sensor_msgs/Image", "ros1msg", "ros1", "'sensor_msgs/Image in ros1'"),
        ("sensor_msgs/msg/Image", "ros2msg", "json", "'sensor_msgs/msg/Image in json'"),
    ],
)
def test_other_message_types_are_named(
    tmp_path: Path, schema: str, encoding: str, message_encoding: str, expected: str
) -> None:
    file = foreign_bag(tmp_path / "pick.mcap", schema, encoding, message_encoding, topics=("/camera",))
    assert f"topic '/camera' has messages of {expected}: expected sensor_msgs" in refusal(file, camera="/camera")


def test_a_bag_needs_an_instruction(one: Path) -> None:
    assert "is a bag, which does not say what the task was: give it in words" in refusal(one, instruction=None)


def test_a_folder_has_an_episode_in_each_bag(tmp_path: Path) -> None:
    folder = tmp_path / "bags"
    raw_bag(folder / "try10.mcap", episode=1)
    raw_bag(folder / "try2.mcap", episode=0)
    raw_bag(folder / "try3" / "try3_0.mcap", episode=0)
    (folder / "notes").mkdir()
    frames = evla.read_recording(folder, instruction=TASK, every=5)
    assert [frame.episode for frame in frames] == ["try2", "try2", "try3", "try3", "try10", "try10"]
    assert_shows(frames[-1].image, source_frame(1, 5))
    chosen = evla.read_recording(folder, instruction=TASK, every=5, episodes=[0, 2])
    assert [frame.episode for frame in chosen] == ["try2", "try2", "try10", "try10"]
    assert "has no episode 3: it has 3, 0 to 2" in refusal(folder, episodes=[3])


def test_the_parts_of_one_bag_are_one_episode(tmp_path: Path) -> None:
    folder = tmp_path / "pick"
    raw_bag(folder / "pick_10.mcap", episode=1)
    raw_bag(folder / "pick_9.mcap", episode=0)
    (folder / "metadata.yaml").write_text("rosbag2_bagfile_information: {}\n", encoding="utf-8")
    frames = evla.read_recording(folder, instruction=TASK, every=4)
    assert [frame.episode for frame in frames] == ["pick"] * 4
    # 6 messages, then 9: every fourth of all 15 is 0 and 4 of the first part, 2 and 6 of the second
    for frame, place in zip(frames, ((0, 0), (0, 4), (1, 2), (1, 6)), strict=True):
        assert_shows(frame.image, source_frame(*place))


def test_a_bag_without_messages_on_the_topic_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "bags"
    raw_bag(folder / "a.mcap", topic="/camera")
    foreign_bag(folder / "quiet.mcap", RAW, "ros2msg", "cdr", topics=("/talk", "/camera"))
    assert "bag 'quiet' has no messages on '/camera'" in refusal(folder, camera="/camera")
    assert len(evla.read_recording(folder, camera="/camera", instruction=TASK, episodes=[0])) == LENGTHS[0]


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (raw_message(source_frame(0, 0), data=b"\0" * 100), "100 bytes in all: expected rows of at least 192 bytes"),
        (raw_message(source_frame(0, 0), step=100), "in rows of 100 bytes"),
        (raw_message(source_frame(0, 0), height=0), "64 x 0 pixels"),
        (raw_message(source_frame(0, 0), height=2**32 - 1, width=2**32 - 1), "67,108,864 pixels at most"),
        (raw_message(source_frame(0, 0), encoding="16UC1"), "encoding '16UC1': expected one of rgb8, bgr8"),
    ],
)
def test_malformed_raw_images_are_named(tmp_path: Path, message: dict[str, Any], expected: str) -> None:
    file = write_bag(tmp_path / "pick.mcap", {"/camera": (RAW, [message])})
    found = refusal(file)
    assert "message 0 of /camera: " in found
    assert expected in found


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        (compressed_message(source_frame(0, 0), data=b"\xff\xd8 no"), "cannot be read"),
        (compressed_message(source_frame(0, 0), data=b""), "unknown format"),
        (compressed_message(source_frame(0, 0), "16UC1; compressedDepth png"), "is depth: expected colours"),
    ],
)
def test_malformed_compressed_images_are_named(tmp_path: Path, message: dict[str, Any], expected: str) -> None:
    file = write_bag(tmp_path / "pick.mcap", {"/camera": (COMPRESSED, [message])})
    assert expected in refusal(file)


def test_a_message_that_is_cut_off_is_named() -> None:
    for data in (b"", b"\0\1\0\0", b"\0\1\0\0" + b"\xff" * 20):
        with pytest.raises(ValueError, match=r"no sensor_msgs/msg/Image .*: the bag is damaged"):
            ros_image.image_decoder(RAW, convert=False)(data)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_a_bag_that_is_cut_off_is_refused(one: Path, share: float) -> None:
    one.write_bytes(one.read_bytes()[: int(one.stat().st_size * share)])
    assert "run mcap recover" in refusal(one)


def test_a_damaged_bag_is_refused_and_never_crashes(one: Path) -> None:
    good = one.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        spoiled = bytearray(good)
        for place in rng.integers(0, len(good), 20):
            spoiled[place] = rng.integers(0, 256)
        one.write_bytes(bytes(spoiled))
        try:
            evla.read_recording(one, instruction=TASK)
        except CalibrationError:
            refused += 1
    assert refused > 0


def test_a_bag_without_an_index_is_refused(tmp_path: Path) -> None:
    writer = pytest.importorskip("mcap.writer")
    with (tmp_path / "pick.mcap").open("wb") as stream:
        recording = writer.Writer(stream, use_statistics=False, use_chunking=False)
        recording.start()
        recording.finish()
    assert "has no index" in refusal(tmp_path / "pick.mcap")


def test_a_chunk_that_is_huge_when_decompressed_is_refused(one: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bags, "MOST_CHUNK_BYTES", 1000)
    assert "expected 1,000 at most" in refusal(one)


@pytest.mark.parametrize("module", ["mcap.reader", "mcap_ros2.decoder"])
def test_a_missing_library_says_what_to_install(one: Path, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(CalibrationError, match=r'an MCAP bag needs .* pip install "evla-compile\[mcap\]"'):
        evla.read_recording(one, instruction=TASK)
