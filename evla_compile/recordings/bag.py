"""Read camera frames out of MCAP bags of ROS 2; no torch, no ROS."""

import re
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evla_compile.errors import CalibrationError
from evla_compile.host.frames import Frame
from evla_compile.recordings.recording import Recording, import_extra, some_of
from evla_compile.recordings.ros_image import DEFINITIONS, image_decoder
from evla_compile.recordings.selection import Selection

SUFFIX = ".mcap"
"""How the files end."""
METADATA = "metadata.yaml"
"""File of a folder that `ros2 bag record` wrote: its MCAP files are parts of one bag."""
MOST_CHUNK_BYTES = 2**30
"""Bytes of the largest chunk of a bag, decompressed, as its index says."""

# The library checks little itself: a damaged bag can end in almost any error.
_DAMAGE = (ValueError, LookupError, OSError, RuntimeError, MemoryError, ArithmeticError, struct.error)

_TYPES = " or ".join(DEFINITIONS)


@dataclass(frozen=True, kw_only=True, slots=True)
class Bag:
    """The files of one recorded episode."""

    name: str
    """Name of the episode."""
    files: tuple[Path, ...]
    """Its files in their order."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Part:
    """One file of a bag."""

    bag: str
    """Name of the bag."""
    file: Path
    """The file."""
    kind: str
    """Message type of the topic."""
    messages: int
    """Messages on the topic."""


def find_bags(path: Path) -> list[Bag]:
    """Return the bags at a path, in the order of their names, numbers in them as numbers; empty where there are none.

    An MCAP file is one bag, and so is a folder that `ros2 bag record` wrote. Other folders have a bag in each of their
    MCAP files and in each folder in them that has such files.
    """
    if path.is_file():
        return [Bag(name=path.stem, files=(path,))] if path.suffix == SUFFIX else []
    if not path.is_dir():
        return []
    if (path / METADATA).is_file():
        files = _ordered(path.glob(f"*{SUFFIX}"))
        return [Bag(name=path.resolve().name, files=tuple(files))] if files else []
    bags = []
    for entry in _ordered(path.iterdir()):
        files = [entry] if entry.suffix == SUFFIX and entry.is_file() else []
        files = _ordered(entry.glob(f"*{SUFFIX}")) if entry.is_dir() else files
        bags += [Bag(name=entry.stem if entry.is_file() else entry.name, files=tuple(files))] if files else []
    return bags


def open_bags(path: Path, selection: Selection, *, convert: bool) -> Recording:
    """Return the chosen frames of MCAP bags; indexes are read and checked, messages are not.

    Args:
        path: an MCAP file, or a folder of them; see `find_bags`.
        selection: image topic, instruction, every k-th message, and which bags, counted from 0 by their names.
        convert: take greyscale images as RGB.

    Raises:
        CalibrationError: a bag is damaged or has no index, has no such topic, or no instruction was given.
    """
    bags = find_bags(path)
    if selection.instruction is None:
        raise CalibrationError(
            f"{path} is a bag, which does not say what the task was: give it in words with --instruction"
            " (instruction= in Python)"
        )
    wanted = range(len(bags)) if selection.episodes is None else sorted(set(selection.episodes))
    if wanted and wanted[-1] >= len(bags):
        raise CalibrationError(f"{path} has no episode {wanted[-1]}: it has {len(bags)}, 0 to {len(bags) - 1}")
    chosen = [bags[index] for index in wanted]
    topic, parts = selection.camera, []
    for bag in chosen:
        for file in bag.files:
            topic, kind, messages = _find_topic(file, topic)
            parts.append(_Part(bag=bag.name, file=file, kind=kind, messages=messages))
    counts = {bag.name: sum(part.messages for part in parts if part.bag == bag.name) for bag in chosen}
    empty = [name for name, messages in counts.items() if messages == 0]
    if empty:
        raise CalibrationError(
            f"{path}: bag {empty[0]!r:.80} has no messages on {topic!r:.80}: choose other --episodes"
        )
    return Recording(
        kind="MCAP bag",
        camera=str(topic),
        count=sum(-(-messages // selection.every) for messages in counts.values()),
        frames=_frames(parts, str(topic), selection, convert=convert),
    )


def _frames(parts: Sequence[_Part], topic: str, selection: Selection, *, convert: bool) -> Iterator[Frame]:
    bag, number = "", 0
    for part in parts:
        bag, number = part.bag, number if part.bag == bag else 0
        decode = image_decoder(part.kind, convert=convert)
        for data in _read(part.file, topic):
            if number % selection.every == 0:
                try:
                    image = decode(data)
                except ValueError as error:
                    raise CalibrationError(f"{part.file}, message {number} of {topic}: {error}") from error
                yield Frame(image, str(selection.instruction), part.bag)
            number += 1


def _find_topic(file: Path, wanted: str | None) -> tuple[str, str, int]:
    """Return the topic asked for, or the only image topic, its message type and how many messages it has."""
    with _opened(file) as (_, summary):
        kinds: dict[str, set[str]] = {}
        for channel in summary.channels.values():
            kinds.setdefault(channel.topic, set()).add(_kind(summary, channel))
        images = sorted(topic for topic, found in kinds.items() if len(found) == 1 and found <= DEFINITIONS.keys())
        topic = wanted if wanted is not None else images[0] if len(images) == 1 else None
        if topic is None:
            raise CalibrationError(
                f"{file} has {len(images)} image topics, {some_of(images)}, among {some_of(sorted(kinds))}: "
                + ("choose one with --camera TOPIC (camera=TOPIC in Python)" if images else f"expected {_TYPES}")
            )
        if topic not in kinds:
            raise CalibrationError(
                f"{file} has no topic {topic!r:.80}: expected one of its image topics, {some_of(images)}"
            )
        if topic not in images:
            raise CalibrationError(
                f"{file}: topic {topic!r:.80} has messages of {some_of(sorted(kinds[topic]))}: expected {_TYPES} in"
                f" CDR; its image topics are {some_of(images)}"
            )
        (kind,) = kinds[topic]
        counts = summary.statistics.channel_message_counts
        numbers = [number for number, channel in summary.channels.items() if channel.topic == topic]
        return topic, kind, sum(counts.get(number, 0) for number in numbers)


def _read(file: Path, topic: str) -> Iterator[bytes]:
    """Yield the messages of a topic in the order in which they were logged."""
    with _opened(file) as (reader, _):
        for _, _, message in reader.iter_messages(topics=[topic]):
            yield message.data


@contextmanager
def _opened(file: Path) -> Iterator[tuple[Any, Any]]:
    """Yield a reader of a bag and its index; what goes wrong in the library within the block is reported as damage."""
    reading = import_extra("mcap.reader", "mcap", "an MCAP bag")
    mcap_error = import_extra("mcap.exceptions", "mcap", "an MCAP bag").McapError
    zstd_error = import_extra("zstandard", "mcap", "an MCAP bag").ZstdError
    try:
        with file.open("rb") as stream:
            reader = reading.make_reader(stream, validate_crcs=True)
            summary = reader.get_summary()
            if summary is None or summary.statistics is None or not summary.chunk_indexes:
                raise CalibrationError(
                    f"{file} has no index, as after a recording that was cut off: run mcap recover first"
                )
            largest = max(chunk.uncompressed_size for chunk in summary.chunk_indexes)
            if largest > MOST_CHUNK_BYTES:
                raise CalibrationError(
                    f"{file} has a chunk of {largest:,} bytes: expected {MOST_CHUNK_BYTES:,} at most"
                )
            yield reader, summary
    except (mcap_error, zstd_error, *_DAMAGE) as error:
        raise CalibrationError(
            f"{file} cannot be read ({type(error).__name__}: {error!s:.200}): expected an MCAP file; it is damaged or"
            " cut off: copy it again, or run mcap recover"
        ) from error


def _kind(summary: Any, channel: Any) -> str:
    """Return the message type of a channel, as ROS 2 names it; with its encoding where that is not CDR."""
    schema = summary.schemas.get(channel.schema_id)
    name = "no schema" if schema is None else str(schema.name)
    return name if channel.message_encoding == "cdr" else f"{name} in {channel.message_encoding}"


def _ordered(paths: Iterator[Path]) -> list[Path]:
    """Return paths in the order of their names, with numbers in them compared as numbers."""

    def parts(path: Path) -> list[tuple[int, str]]:
        return [(int(part) if part.isdecimal() else -1, part) for part in re.split(r"(\d+)", path.name)]

    return sorted(paths, key=parts)
