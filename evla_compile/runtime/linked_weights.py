"""Load graphs whose weight files are links, as in Hugging Face's cache; onnx and ONNX Runtime refuse such links.

Call these functions after `evla_compile.artifact.files.check_files`, which compares the files behind links with the
manifest. They need the package onnx when they are called, not when this module is imported.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from evla_compile.errors import ArtifactError

if TYPE_CHECKING:
    import onnx


def read_checked(path: Path) -> "onnx.ModelProto":
    """Return a graph, without its weights, that `onnx.checker` accepts.

    The checker refuses external data behind a link. A graph with such weights is checked with the weights as inputs:
    so the checker does not see whether the data file is long enough, but its size is compared with the manifest's.

    Raises:
        onnx.checker.ValidationError: the checker refuses the graph.
        google.protobuf.message.DecodeError: the file is no graph.
    """
    import onnx  # noqa: PLC0415 (a robot may lack it)
    from onnx import checker, helper  # noqa: PLC0415

    model = onnx.load(str(path), load_external_data=False)
    if not any((path.parent / entry.value).is_symlink() for entry in _locations(model)):
        checker.check_model(str(path))
        return model
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for index in reversed(range(len(bare.graph.initializer))):
        tensor = bare.graph.initializer[index]
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            bare.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
            del bare.graph.initializer[index]
    checker.check_model(bare)
    return model


def follow_links(model: "onnx.ModelProto", folder: Path) -> Path:
    """Rename the data files in `model` to the targets of their links, and return the folder of these targets.

    Raises:
        ArtifactError: links lead to several folders.
    """
    entries = list(_locations(model))
    if not any((folder / entry.value).is_symlink() for entry in entries):
        return folder
    places = {(folder / entry.value).resolve().parent for entry in entries}
    if len(places) > 1:
        raise ArtifactError(
            f"{folder}: links to its weights lead to {', '.join(map(str, sorted(places)))}, expected one folder: copy"
            " the artifact with its links followed, cp -rL"
        )
    for entry in entries:
        entry.value = (folder / entry.value).resolve().name
    return places.pop()


def _locations(model: "onnx.ModelProto") -> "Iterator[onnx.StringStringEntryProto]":
    from onnx import TensorProto  # noqa: PLC0415

    for tensor in model.graph.initializer:
        if tensor.data_location == TensorProto.EXTERNAL:
            yield from (entry for entry in tensor.external_data if entry.key == "location")
