"""Files of a dataset as untrusted input: their size is limited, and no path leads out of the folder; no torch."""

import json
import re
import string
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from evla_compile.errors import CalibrationError

MOST_TEXT_BYTES = 256_000_000
"""Bytes of the largest JSON file that is read."""

_PADDING = re.compile(r"|d|0?[1-9]d?")


def read_json(file: Path) -> Any:
    """Return what a JSON file holds.

    Raises:
        CalibrationError: the file is missing, too large or not JSON.
    """
    return _parse(_read_text(file), str(file))


def read_json_lines(file: Path) -> list[Any]:
    """Return what each line of a file of JSON lines holds.

    Raises:
        CalibrationError: the file is missing, too large, or a line is not JSON; the message names the line.
    """
    lines = _read_text(file).split("\n")
    return [_parse(line, f"{file}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def place_of(folder: Path, template: str, values: Mapping[str, str | int], source: str) -> Path:
    """Return the path in a folder that a template of a dataset leads to.

    Only plain names and the padding of whole numbers are understood, as in `{chunk_index:03d}`: with `str.format` a
    template could read attributes and ask for texts of any length.

    Args:
        folder: the dataset.
        template: the template, such as `data/chunk-{chunk_index:03d}/file-{file_index:03d}.parquet`.
        values: what the names stand for.
        source: file and field that the template is from, for the message.

    Raises:
        CalibrationError: the template is malformed, or the path leads out of the folder.
    """
    names = ", ".join(values)
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise CalibrationError(f"{source} is {template!r:.120} ({error}): expected a path with {{{names}}}") from error
    path = ""
    for text, name, padding, conversion in parsed:
        path += text
        if name is None:
            continue
        value = values.get(name)
        if value is None or conversion or not _PADDING.fullmatch(padding or "") or (padding and isinstance(value, str)):
            raise CalibrationError(
                f"{source} is {template!r:.120}: expected a path whose fields are among {names}, found {name!r:.40}"
            )
        path += format(value, padding or "")
    return inside(folder, path, source)


def inside(folder: Path, path: str, source: str) -> Path:
    """Return a relative path in a folder.

    Links are followed, since the Hugging Face cache consists of them.

    Raises:
        CalibrationError: the path is absolute, empty or leads out of the folder.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or not path.isprintable():
        raise CalibrationError(f"{source} leads to {path!r:.120}: expected a path inside {folder}")
    return folder.joinpath(*parts)


def _read_text(file: Path) -> str:
    try:
        if file.stat().st_size > MOST_TEXT_BYTES:
            raise CalibrationError(f"{file} has {file.stat().st_size:,} bytes: expected {MOST_TEXT_BYTES:,} at most")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(
            f"{file} cannot be read ({error}): expected it in a LeRobotDataset; download the whole dataset"
        ) from error


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CalibrationError(f"{place} is not JSON ({error}): download the dataset again") from error
