"""Episodes and tasks of a LeRobotDataset, in the layouts of format 2 and format 3; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evla_compile.arguments import is_whole, lone_surrogate
from evla_compile.errors import CalibrationError
from evla_compile.recordings.dataset_files import read_json_lines
from evla_compile.recordings.dataset_info import Camera, DatasetInfo
from evla_compile.recordings.parquet_columns import real_numbers, texts, whole_numbers
from evla_compile.recordings.selection import MOST_EPISODES

MOST_FILES = 10_000
"""Files of the largest folder of episodes that is read."""
_LARGEST = 2**31


@dataclass(frozen=True, kw_only=True, slots=True)
class Episode:
    """Where one episode of a dataset is."""

    index: int
    """Its number in the dataset."""
    length: int
    """Frames of it."""
    data: Path
    """Parquet file with its rows."""
    video: Path | None
    """Video of the camera; None where the parquet file has its images."""
    start: float
    """Seconds in the video at which it begins."""


def read_tasks(info: DatasetInfo) -> dict[int, str]:
    """Return the text of every task by its number.

    Raises:
        CalibrationError: the file of tasks is missing or malformed.
    """
    if info.layout == "files per episode":
        file = info.folder / "meta" / "tasks.jsonl"
        entries = read_json_lines(file)
        numbers = [_whole(entry, "task_index", file) for entry in entries]
        words = [entry.get("task") for entry in entries]
    else:
        file = info.folder / "meta" / "tasks.parquet"
        # pandas keeps the text as its index, under that index's name if it has one.
        words = list[Any](texts(file, ("task", "__index_level_0__")))
        (column,) = whole_numbers(file, "task_index")
        numbers = column.tolist()
    for number, text in zip(numbers, words, strict=True):
        if not isinstance(text, str) or lone_surrogate(text):
            raise CalibrationError(f"{file}: task {number} is {text!r:.80}, expected a text")
    return dict(zip(numbers, words, strict=True))


def read_episodes(info: DatasetInfo, camera: Camera, wanted: Sequence[int] | None) -> list[Episode]:
    """Return the episodes asked for in the order of their numbers; all for None.

    Raises:
        CalibrationError: the files of episodes are missing or malformed, or there is no such episode.
    """
    per_episode = info.layout == "files per episode"
    found = _from_lines(info, camera) if per_episode else _from_tables(info, camera)
    if not found or len(found) > MOST_EPISODES:
        raise CalibrationError(f"{info.folder} has {len(found)} episodes: expected 1 to {MOST_EPISODES:,}")
    if wanted is None:
        return [found[index] for index in sorted(found)]
    missing = sorted(set(wanted) - found.keys())
    if missing:
        raise CalibrationError(
            f"{info.folder} has no episode {missing[0]}: it has {len(found)} episodes, {min(found)} to {max(found)}"
        )
    return [found[index] for index in sorted(set(wanted))]


def _from_lines(info: DatasetInfo, camera: Camera) -> dict[int, Episode]:
    file = info.folder / "meta" / "episodes.jsonl"
    found = {}
    for entry in read_json_lines(file):
        index, length = _whole(entry, "episode_index", file), _whole(entry, "length", file)
        values = {"episode_chunk": index // info.chunk_size, "episode_index": index}
        video = info.video_file(camera.key, values) if camera.in_video else None
        found[index] = Episode(index=index, length=length, data=info.data_file(values), video=video, start=0.0)
    return found


def _from_tables(info: DatasetInfo, camera: Camera) -> dict[int, Episode]:
    folder = info.folder / "meta" / "episodes"
    files = sorted(folder.rglob("*.parquet"))
    if not files or len(files) > MOST_FILES:
        raise CalibrationError(
            f"{folder} has {len(files)} parquet files: expected 1 to {MOST_FILES:,}; download the whole dataset"
        )
    found = {}
    for file in files:
        prefix = f"videos/{camera.key}"
        names = ["episode_index", "length", "data/chunk_index", "data/file_index"]
        names += [f"{prefix}/chunk_index", f"{prefix}/file_index"] if camera.in_video else []
        columns = whole_numbers(file, *names)
        starts = (
            real_numbers(file, f"{prefix}/from_timestamp")[0].tolist() if camera.in_video else [0.0] * len(columns[0])
        )
        for row, start in zip(zip(*(column.tolist() for column in columns), strict=True), starts, strict=True):
            if not all(0 <= number < _LARGEST for number in row) or not 0 <= start < _LARGEST:
                raise CalibrationError(f"{file}: episode {row[0]} has numbers out of range: expected 0 to 2**31 - 1")
            index, length, chunk, number, *video = row
            found[index] = Episode(
                index=index,
                length=length,
                data=info.data_file(_numbers(info, index, chunk, number)),
                video=info.video_file(camera.key, _numbers(info, index, *video)) if camera.in_video else None,
                start=start,
            )
    return found


def _numbers(info: DatasetInfo, index: int, chunk: int, file: int) -> Mapping[str, int]:
    return {"chunk_index": chunk, "file_index": file, "episode_index": index}


def _whole(entry: Any, name: str, file: Path) -> int:
    value = entry.get(name) if isinstance(entry, dict) else None
    if not is_whole(value) or not 0 <= value < _LARGEST:
        raise CalibrationError(f"{file}: {name} in {entry!r:.80}: expected a whole number from 0 up")
    return int(value)
