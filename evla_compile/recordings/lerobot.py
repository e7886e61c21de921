"""Read the frames of a LeRobotDataset of format 2 or 3, from videos or from images in its parquet files; no torch.

Shape legend: n chosen frames of an episode.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame
from evla_compile.host.image_file import decode_image, read_image
from evla_compile.recordings.dataset_episodes import Episode, read_episodes, read_tasks
from evla_compile.recordings.dataset_files import inside
from evla_compile.recordings.dataset_info import Camera, DatasetInfo
from evla_compile.recordings.parquet_columns import cells, real_numbers, whole_numbers
from evla_compile.recordings.recording import Recording
from evla_compile.recordings.selection import Selection
from evla_compile.recordings.video import frames_at

LATEST = 1e7
"""Seconds of the longest episode that is read."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Chosen:
    """The chosen frames of one episode."""

    episode: Episode
    rows: NDArray[np.int64]
    """Their rows in the parquet file, int64 [n], ascending."""
    times: NDArray[np.float64]
    """Their times in the video, float64 [n], in seconds."""
    instructions: Sequence[str]
    """The task of each."""


def open_lerobot(folder: Path, selection: Selection, *, convert: bool) -> Recording:
    """Return the chosen frames of a LeRobotDataset; everything but images and videos is read and checked.

    Args:
        folder: the dataset, with its `meta/info.json`.
        selection: camera, episodes, every k-th frame.
        convert: take greyscale, palette and opaque RGBA images of parquet files as RGB.

    Raises:
        CalibrationError: a file is missing or malformed, or does not have what was asked for; the message names it.
    """
    info = DatasetInfo.read(folder)
    camera = info.camera(selection.camera)
    tasks = None if selection.instruction is not None else read_tasks(info)
    table = lru_cache(maxsize=1)(_read_rows)  # several episodes in a row are in one file
    chosen = [
        _choose(episode, table(episode.data, tasks is not None), tasks, selection)
        for episode in read_episodes(info, camera, selection.episodes)
    ]
    return Recording(
        kind=f"LeRobotDataset {info.version}",
        camera=camera.key,
        count=sum(len(part.rows) for part in chosen),
        frames=_frames(info, camera, chosen, convert=convert),
    )


def _read_rows(file: Path, with_tasks: bool) -> tuple[list[NDArray[np.int64]], NDArray[np.float64]]:
    names = ["episode_index", "frame_index", *(["task_index"] if with_tasks else [])]
    return whole_numbers(file, *names), real_numbers(file, "timestamp")[0]


def _choose(
    episode: Episode,
    table: tuple[list[NDArray[np.int64]], NDArray[np.float64]],
    tasks: Mapping[int, str] | None,
    selection: Selection,
) -> _Chosen:
    (episodes, numbers, *task), seconds = table
    rows = np.flatnonzero(episodes == episode.index)
    if len(rows) != episode.length or len(rows) == 0:
        raise CalibrationError(
            f"{episode.data} has {len(rows)} rows of episode {episode.index}: expected {episode.length}, as the"
            " dataset's list of episodes says, and one at least; download the dataset again"
        )
    if (
        (np.diff(numbers[rows]) <= 0).any()
        or (np.diff(seconds[rows]) <= 0).any()
        or not 0 <= seconds[rows[0]] <= seconds[rows[-1]] < LATEST
    ):
        raise CalibrationError(
            f"{episode.data}: frame_index or timestamp of episode {episode.index} does not ascend from 0 up: expected"
            " frames in their order; download the dataset again"
        )
    rows = rows[:: selection.every]
    if tasks is None:
        instructions = [str(selection.instruction)] * len(rows)
    else:
        instructions = [_task(int(number), tasks, episode) for number in task[0][rows]]
    return _Chosen(episode=episode, rows=rows, times=episode.start + seconds[rows], instructions=instructions)


def _task(number: int, tasks: Mapping[int, str], episode: Episode) -> str:
    text = tasks.get(number, "").strip()
    if not text:
        raise CalibrationError(
            f"{episode.data}: episode {episode.index} has task {number}, and the dataset's tasks have no text for it;"
            " give the task in words with --instruction (instruction= in Python), or leave the episode out"
        )
    return text


def _frames(info: DatasetInfo, camera: Camera, chosen: Sequence[_Chosen], *, convert: bool) -> Iterator[Frame]:
    for part in chosen:
        if part.episode.video is not None:
            images = frames_at(part.episode.video, part.times.tolist(), tolerance=0.5 / info.fps)
        else:
            images = _embedded(info.folder, part, camera.key, convert=convert)
        for image, instruction in zip(images, part.instructions, strict=True):
            yield Frame(image, instruction, str(part.episode.index))


def _embedded(folder: Path, part: _Chosen, key: str, *, convert: bool) -> Iterator[Image.Image]:
    file = part.episode.data
    for row, cell in zip(part.rows.tolist(), cells(file, key, part.rows), strict=True):
        place = f"{file}, row {row}, {key}"
        try:
            yield _decode(folder, cell, place, convert=convert)
        except ValueError as error:
            raise CalibrationError(f"{place}: {error}") from error


def _decode(folder: Path, cell: Mapping[str, Any], place: str, *, convert: bool) -> Image.Image:
    data, path = cell.get("bytes"), cell.get("path")
    if isinstance(data, bytes) and data:
        return decode_image(data, "in the cell", convert=convert)
    if isinstance(path, str) and path:
        return read_image(inside(folder, path, place), convert=convert)
    raise ValueError(f"found fields {', '.join(cell) or 'none'}: expected bytes of an image, or the path of one")
