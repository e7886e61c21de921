"""Which files an ONNX graph takes weights from, parsed from its bytes: without onnx, and without reading a weight."""

from collections.abc import Iterator, Mapping
from mmap import ACCESS_READ, mmap
from pathlib import Path
from types import MappingProxyType

from evla_compile.artifact.records import Part
from evla_compile.errors import ArtifactError

FIELDS: Mapping[str, Mapping[int, str]] = MappingProxyType(
    {
        "ModelProto": {7: "GraphProto", 20: "TrainingInfoProto", 25: "FunctionProto"},
        "TrainingInfoProto": {1: "GraphProto", 2: "GraphProto"},
        "FunctionProto": {7: "NodeProto", 11: "AttributeProto"},
        "GraphProto": {1: "NodeProto", 5: "TensorProto", 15: "SparseTensorProto"},
        "NodeProto": {5: "AttributeProto"},
        "AttributeProto": {
            5: "TensorProto",
            6: "GraphProto",
            10: "TensorProto",
            11: "GraphProto",
            22: "SparseTensorProto",
            23: "SparseTensorProto",
        },
        "SparseTensorProto": {1: "TensorProto", 2: "TensorProto"},
        "TensorProto": {13: "StringStringEntryProto"},
    }
)
"""Fields of ONNX's messages that can contain a tensor: message -> number of the field -> message within it."""

_ENTRY, _KEY, _VALUE = "StringStringEntryProto", 1, 2
_VARINT, _EIGHT_BYTES, _COUNTED, _FOUR_BYTES = 0, 1, 2, 5


def check_external_data(part: Part, folder: Path) -> None:
    """Refuse weights in files that the manifest does not list, since no hash covers them.

    Raises:
        ArtifactError: the files that the graph names are not those of `part`, or it is no ONNX file.
    """
    model, listed = folder / part.model.name, {record.name for record in part.data}
    used = external_files(model)
    if used != listed:
        raise ArtifactError(
            f"{model} keeps weights in {sorted(used)}, its manifest lists {sorted(listed)}: copy the artifact again, or"
            " compile the policy again"
        )


def external_files(path: Path) -> set[str]:
    """Return the names of all files with tensors of an ONNX file, as it spells them.

    Raises:
        ArtifactError: the file cannot be read, or is no ONNX file.
    """
    try:
        with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
            return {text.decode("utf-8", "surrogateescape") for text in _locations(data)}
    except (OSError, ValueError, IndexError) as error:
        raise ArtifactError(f"{path} is no ONNX file ({error}): compile the policy again") from error


def _locations(data: mmap) -> Iterator[bytes]:
    spans = [("ModelProto", 0, len(data))]
    while spans:
        message, start, end = spans.pop()
        if message == _ENTRY:
            fields = [(number, data[first:last]) for number, first, last in _fields(data, start, end)]
            if (_KEY, b"location") in fields:
                yield from (value for number, value in fields if number == _VALUE)
            continue
        known = FIELDS[message]
        spans += [(known[number], first, last) for number, first, last in _fields(data, start, end) if number in known]


def _fields(data: mmap, position: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, start and end of every field of a message that has a length: texts, bytes, messages."""
    while position < end:
        tag, position = _varint(data, position)
        kind = tag & 7
        if kind == _COUNTED:
            size, position = _varint(data, position)
            if size > end - position:
                raise ValueError(f"a field of {size} bytes where {end - position} are left")
            yield tag >> 3, position, position + size
            position += size
        elif kind == _VARINT:
            _, position = _varint(data, position)
        elif kind in (_EIGHT_BYTES, _FOUR_BYTES):
            position += 8 if kind == _EIGHT_BYTES else 4
        else:
            raise ValueError(f"a field of the unknown kind {kind} at byte {position}")
    if position != end:
        raise ValueError(f"a field that ends at byte {position} of a message that ends at {end}")


def _varint(data: mmap, position: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 70:
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7
    raise ValueError(f"a number of more than 10 bytes before byte {position}")
