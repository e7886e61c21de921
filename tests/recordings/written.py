"""Small real recordings, written as lerobot and ROS 2 write them, and the frames that they were made of."""

import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from mcap.writer import Writer as McapWriter
from mcap_ros2.writer import Writer
from numpy.typing import NDArray
from PIL import Image

from evla_compile.recordings.ros_image import DEFINITIONS

FPS = 10
LENGTHS = (6, 9)
"""Frames of each episode."""
TASKS = ("open the door", "close the [red] drawer")
"""Task of each episode."""
TOP, WRIST, DEPTH = "observation.images.top", "observation.images.wrist", "observation.images.depth"

Pixels = NDArray[np.uint8]


def source_frame(episode: int, number: int, *, wrist: bool = False) -> Pixels:
    """A frame that no other is like: uint8 [48,64,3]."""
    level = 15 * (number + 1)
    frame = np.full((48, 64, 3), (level, 60 + 100 * episode, 255 - level), dtype=np.uint8)
    frame[:, 4 * number : 4 * number + 8] = (255, 255, 0) if wrist else (0, 255, 255)
    return frame


def source_frames(episode: int, *, wrist: bool = False) -> list[Pixels]:
    return [source_frame(episode, number, wrist=wrist) for number in range(LENGTHS[episode])]


def assert_shows(image: Any, expected: Pixels) -> None:
    """Assert that an image is what a codec left of a frame; neighbours in time differ by far more."""
    found = np.asarray(image).astype(int)
    assert found.shape == expected.shape
    assert np.abs(found - expected).mean() < 4


def write_video(
    file: Path, frames: Sequence[Pixels], *, greyscale: bool = False, rate: int = FPS, form: str = "mp4"
) -> None:
    """Write frames as H.264, with a key frame every 5 frames and B frames between, or as greyscale FFV1."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(file), "w", format=form) as container:
        options = {} if greyscale else {"g": "5", "crf": "8"}
        stream = container.add_stream("ffv1" if greyscale else "libx264", rate=rate, options=options)
        stream.width, stream.height = frames[0].shape[1], frames[0].shape[0]
        stream.pix_fmt = "gray" if greyscale else "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def feature(kind: str = "video", channels: int = 3, *, depth: bool = False) -> dict[str, Any]:
    return {
        "dtype": kind,
        "shape": [48, 64, channels],
        "names": ["height", "width", "channels"],
        "info": {"video.is_depth_map": depth},
    }


def write_info(folder: Path, **changes: Any) -> None:
    """Write `meta/info.json`, or change it."""
    file = folder / "meta" / "info.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    info = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    file.write_text(json.dumps({**info, **changes}), encoding="utf-8")


def write_table(file: Path, columns: Mapping[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), file)


def change_table(file: Path, **changes: Any) -> None:
    """Replace columns of a parquet file; None removes one."""
    columns = {name: pq.read_table(file).column(name) for name in pq.read_table(file).column_names} | changes
    write_table(file, {name: column for name, column in columns.items() if column is not None})


def rows(*episodes: int) -> dict[str, Any]:
    """The columns of some episodes in a data file."""
    numbers = [(episode, number) for episode in episodes for number in range(LENGTHS[episode])]
    return {
        "timestamp": pa.array([number / FPS for _, number in numbers], pa.float32()),
        "frame_index": [number for _, number in numbers],
        "episode_index": [episode for episode, _ in numbers],
        "task_index": [episode for episode, _ in numbers],
        "action": [[0.0, 1.0]] * len(numbers),
    }


def write_v3(folder: Path, *, cameras: Sequence[str] = (TOP,)) -> Path:
    """Write a dataset of version 3: two episodes in one parquet file and in one video a camera."""
    write_info(
        folder,
        codebase_version="v3.0",
        fps=FPS,
        chunks_size=1000,
        data_path="data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet",
        video_path="videos/{video_key}/chunk-{chunk_index:03d}/file-{file_index:03d}.mp4",
        features={
            "action": {"dtype": "float32", "shape": [2], "names": None},
            **{camera: feature() for camera in cameras},
        },
    )
    write_table(folder / "meta/tasks.parquet", {"task_index": [0, 1], "__index_level_0__": list(TASKS)})
    episodes: dict[str, Any] = {
        "episode_index": [0, 1],
        "tasks": [[text] for text in TASKS],
        "length": list(LENGTHS),
        "data/chunk_index": [0, 0],
        "data/file_index": [0, 0],
    }
    for camera in cameras:
        starts = {"chunk_index": [0, 0], "file_index": [0, 0], "from_timestamp": [0.0, LENGTHS[0] / FPS]}
        episodes |= {f"videos/{camera}/{name}": values for name, values in starts.items()}
        frames = [frame for episode in (0, 1) for frame in source_frames(episode, wrist=camera == WRIST)]
        write_video(folder / f"videos/{camera}/chunk-000/file-000.mp4", frames)
    write_table(folder / "meta/episodes/chunk-000/file-000.parquet", episodes)
    write_table(folder / "data/chunk-000/file-000.parquet", rows(0, 1))
    return folder


def write_v21(folder: Path, *, kind: str = "video") -> Path:
    """Write a dataset of version 2.1: a parquet file an episode, and a video or images in it."""
    write_info(
        folder,
        codebase_version="v2.1",
        fps=FPS,
        chunks_size=1,
        data_path="data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet",
        video_path="videos/chunk-{episode_chunk:03d}/{video_key}/episode_{episode_index:06d}.mp4"
        if kind == "video"
        else None,
        features={TOP: feature(kind)},
    )
    tasks = [{"task_index": index, "task": text} for index, text in enumerate(TASKS)]
    episodes = [{"episode_index": i, "tasks": [TASKS[i]], "length": length} for i, length in enumerate(LENGTHS)]
    for name, lines in (("tasks", tasks), ("episodes", episodes)):
        (folder / f"meta/{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    for episode in (0, 1):
        columns = rows(episode)
        if kind == "video":
            write_video(folder / f"videos/chunk-00{episode}/{TOP}/episode_00000{episode}.mp4", source_frames(episode))
        else:
            cells = [{"bytes": png(frame), "path": f"{n}.png"} for n, frame in enumerate(source_frames(episode))]
            columns[TOP] = pa.array(cells, pa.struct({"bytes": pa.binary(), "path": pa.string()}))
        write_table(folder / f"data/chunk-00{episode}/episode_00000{episode}.parquet", columns)
    return folder


def png(frame: Pixels) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, format="PNG")
    return buffer.getvalue()


def raw_message(frame: Pixels, encoding: str = "rgb8", *, padding: int = 0, **changes: Any) -> dict[str, Any]:
    """A `sensor_msgs/msg/Image` of an RGB frame, its rows padded."""
    channels = {"rgb8": [0, 1, 2], "bgr8": [2, 1, 0], "rgba8": [0, 1, 2, 0], "bgra8": [2, 1, 0, 0], "mono8": [0]}
    height, width = frame.shape[:2]
    data = frame[:, :, channels.get(encoding, [0, 1, 2])].reshape(height, -1)
    data = np.pad(data, ((0, 0), (0, padding)))
    message = {"height": height, "width": width, "encoding": encoding, "is_bigendian": 0, "step": data.shape[1]}
    return {"header": header(), **message, "data": data.tobytes(), **changes}


def compressed_message(frame: Pixels, form: str = "rgb8; png compressed bgr8", **changes: Any) -> dict[str, Any]:
    """A `sensor_msgs/msg/CompressedImage` of an RGB frame, as PNG."""
    return {"header": header(), "format": form, "data": png(frame), **changes}


def header() -> dict[str, Any]:
    return {"stamp": {"sec": 1, "nanosec": 2}, "frame_id": "camera"}


def write_bag(file: Path, topics: Mapping[str, tuple[str, Sequence[Mapping[str, Any]]]]) -> Path:
    """Write a bag with messages of a type on each topic, ten a second, beside a topic of texts."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        writer = Writer(stream, chunk_size=20_000)
        schemas = {name: writer.register_msgdef(name, text) for name, text in DEFINITIONS.items()}
        text = writer.register_msgdef("std_msgs/msg/String", "string data")
        writer.write_message("/chatter", text, {"data": "hello"}, log_time=0)
        for topic, (kind, messages) in topics.items():
            for number, message in enumerate(messages):
                writer.write_message(topic, schemas[kind], message, log_time=number * 10**8)
        writer.finish()  # type: ignore[no-untyped-call]  # of the library
    return file


def raw_bag(file: Path, episode: int = 0, topic: str = "/camera/image_raw") -> Path:
    messages = [raw_message(frame) for frame in source_frames(episode)]
    return write_bag(file, {topic: ("sensor_msgs/msg/Image", messages)})


def foreign_bag(file: Path, schema: str, encoding: str, message_encoding: str, *, topics: Sequence[str]) -> Path:
    """Write a bag with topics of another encoding, and one message, on the first of them."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as stream:
        writer = McapWriter(stream)
        writer.start()
        number = writer.register_schema(schema, encoding, b"{}")
        channels = [writer.register_channel(topic, message_encoding, number) for topic in topics]
        writer.add_message(channels[0], 0, b"{}", 0)
        writer.finish()  # type: ignore[no-untyped-call]  # of the library
    return file
