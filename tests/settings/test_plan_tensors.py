"""Tensors of a plan in a safetensors file: round trips, the library's own reading, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from evla_compile.errors import CalibrationError
from evla_compile.graph.plan_tensors import to_plan_tensor, to_tensor
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.plan import Plan
from evla_compile.settings.plan_tensors import PlanTensor, read_tensors, write_tensors

VALUES = {
    "a.weight": torch.tensor([[0.1, -2.0], [3.0, 4.5], [0.0, 1e-3]]),
    "b.bias": torch.tensor([1.5, -0.1]).bfloat16(),
    "c.weight": torch.tensor([[7.0, 0.3, -1.0]]).half(),
}
TENSORS = {name: to_plan_tensor(tensor) for name, tensor in VALUES.items()}
PLAN = Plan(decisions=(LayerDecision(keep=(0, 2)),), frames=3, tensors=TENSORS)


def test_they_survive_a_file_that_the_library_reads_too(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", TENSORS)
    found, theirs = read_tensors(tmp_path / "x.safetensors"), load_file(tmp_path / "x.safetensors")
    assert found == TENSORS
    for name, tensor in VALUES.items():
        assert torch.equal(to_tensor(found[name]), tensor)
        assert torch.equal(theirs[name], tensor)
        assert theirs[name].dtype == to_tensor(found[name]).dtype == tensor.dtype


def test_a_plan_is_saved_with_its_tensors_beside_it(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["plan.json", "plan.safetensors"]
    found = Plan.load(tmp_path / "plan.json")
    assert found == PLAN
    assert hash(found) == hash(PLAN)
    assert found.tensor_file is not None
    assert found.tensor_file.size == (tmp_path / "plan.safetensors").stat().st_size


def test_a_plan_without_tensors_is_written_as_before(tmp_path: Path) -> None:
    replace(PLAN, tensors={}, tensor_file=None).save(tmp_path / "plan.json")
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert "tensors" not in json.loads((tmp_path / "plan.json").read_text())


def test_tensors_that_are_missing_or_other_ones_are_refused(tmp_path: Path) -> None:
    PLAN.save(tmp_path / "plan.json")
    others = {**TENSORS, "b.bias": to_plan_tensor(torch.tensor([1.5, -0.2]).bfloat16())}
    write_tensors(tmp_path / "plan.safetensors", others)
    with pytest.raises(CalibrationError, match="is not the file that the plan was written with"):
        Plan.load(tmp_path / "plan.json")
    (tmp_path / "plan.safetensors").unlink()
    with pytest.raises(CalibrationError, match=r"keep plan\.safetensors beside the plan"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_read_from_json_alone_is_neither_saved_nor_used(tmp_path: Path) -> None:
    found = Plan.from_json(PLAN.to_json())
    assert found.tensor_file == PLAN.tensor_file
    with pytest.raises(CalibrationError, match="belongs to 3 refit tensors"):
        found.save(tmp_path / "plan.json")


@pytest.mark.parametrize("change", [{"sha256": "x"}, {"size": -1}, {"count": 1.5}, {"more": 1}])
def test_a_malformed_note_on_the_file_is_refused(change: dict[str, Any]) -> None:
    data = PLAN.to_json()
    with pytest.raises(CalibrationError, match="malformed plan"):
        Plan.from_json({**data, "tensors": {**data["tensors"], **change}})


def malformed(header: object, values: bytes = bytes(8)) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + values


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"12",
        (2**62).to_bytes(8, "little"),
        malformed([]),
        malformed({}),
        malformed({"a": {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]}}),
        malformed({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        malformed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(12)),
        malformed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}, bytes(12)),
        malformed({"a": {"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}}),
        malformed({"a": {"dtype": "F32", "shape": [True, 2], "data_offsets": [0, 8]}}),
        malformed({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, b"\xff" * 8),
        malformed({"a": {"dtype": "BF16", "shape": [4], "data_offsets": [0, 8]}}, b"\x80\x7f" * 4),
        malformed({"a": {"dtype": "F32", "shape": [2]}}),
    ],
)
def test_malformed_files_are_refused(contents: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(contents)
    with pytest.raises(CalibrationError, match=r"x\.safetensors: no tensors of a plan"):
        read_tensors(tmp_path / "x.safetensors")


def test_an_array_of_another_dtype_than_its_name_is_refused() -> None:
    with pytest.raises(ValueError, match="a tensor of 'BF16' in an array of float32"):
        PlanTensor("BF16", np.zeros(2, dtype=np.float32))
