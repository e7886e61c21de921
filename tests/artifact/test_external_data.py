"""The files that a graph takes weights from, by its bytes alone; the oracle is onnx."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from onnx import AttributeProto, ModelProto, TensorProto, helper

from evla_compile.artifact.external_data import FIELDS, external_files
from evla_compile.errors import ArtifactError


def test_every_way_from_a_model_to_a_tensor_is_known() -> None:
    """onnx's own description of its messages, cut to what leads to a tensor's place."""
    messages: dict[str, dict[int, str]] = {}

    def visit(message: Descriptor) -> None:
        if message.name not in messages:
            nested = [field for field in message.fields if field.message_type is not None]
            messages[message.name] = {field.number: field.message_type.name for field in nested}
            for field in nested:
                visit(field.message_type)

    visit(ModelProto.DESCRIPTOR)
    leading = {"TensorProto"}
    for _ in messages:
        leading |= {name for name, fields in messages.items() if leading.intersection(fields.values())}
    expected = {
        name: {number: kind for number, kind in messages[name].items() if kind in leading}
        for name in leading - {"TensorProto"}
    }
    place = {TensorProto.DESCRIPTOR.fields_by_name["external_data"].number: "StringStringEntryProto"}
    assert {name: dict(fields) for name, fields in FIELDS.items()} == {**expected, "TensorProto": place}


def tensor(name: str, location: str | None) -> TensorProto:
    """A tensor with its data elsewhere, or in the file."""
    found = onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32), name)
    if location is not None:
        found.ClearField("raw_data")
        found.data_location = TensorProto.EXTERNAL
        for key, value in (("offset", "0"), ("location", location), ("length", "24")):
            found.external_data.add(key=key, value=value)
    return found


def test_tensors_are_found_wherever_a_graph_may_hold_them(tmp_path: Path) -> None:
    value = helper.make_tensor_value_info("y", TensorProto.FLOAT, [6])
    inner = helper.make_graph([], "inner", [], [value], [tensor("w", "in-subgraph")])
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor("c", "in-node")),
        helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner),
    ]
    model = helper.make_model(helper.make_graph(nodes, "outer", [], [value], [tensor("a", "first"), tensor("b", None)]))
    sparse = model.graph.sparse_initializer.add()
    sparse.values.CopyFrom(tensor("s", "sparse"))
    function = model.functions.add(name="f", domain="d")
    listed = AttributeProto(name="values", type=AttributeProto.TENSORS)
    listed.tensors.append(tensor("t", "in-function"))
    function.node.add(op_type="Constant").attribute.append(listed)
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "m.onnx") == {"first", "in-node", "in-subgraph", "sparse", "in-function"}


def test_weights_are_passed_over(tmp_path: Path) -> None:
    model = helper.make_model(helper.make_graph([], "g", [], [], [tensor("a", None)]))
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    assert external_files(tmp_path / "m.onnx") == set()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\x3a\x05abc", "a field of 5 bytes where 3 are left"),
        (b"\x0b", "the unknown kind 3"),
        (b"\x08" + b"\xff" * 11, "a number of more than 10 bytes"),
        (b"\x08\xff", "out of range"),
        (b"\x09\x00", "a field that ends at byte 9 of a message that ends at 2"),
        (b"\x3a\x01\x08\x0a\x00", "a field that ends at byte 4 of a message that ends at 3"),
    ],
)
def test_bytes_that_are_no_graph_are_refused(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match=f"m.onnx is no ONNX file .*{message}"):
        external_files(tmp_path / "m.onnx")
