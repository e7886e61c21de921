"""Recorded cases as untrusted input: one error for whatever is not what an export of this policy writes."""

import io
import struct
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pytest
from numpy.typing import NDArray

from evla_compile.artifact.cases import RecordedCase, probe, read_cases, recorded_stages, write_cases
from evla_compile.artifact.manifest import Manifest
from evla_compile.artifact.records import FileRecord, Part, TensorSpec
from evla_compile.errors import ArtifactError
from evla_compile.host.inputs import GraphInputs
from evla_compile.host.processor import ActionStatistics
from evla_compile.settings.budgets.layers import LayerDecision
from evla_compile.settings.config import CompileConfig
from evla_compile.settings.plan import Plan

INPUTS = (
    TensorSpec(name="image", dtype="uint8", shape=(1, 28, 28, 3)),
    TensorSpec(name="input_ids", dtype="int64", shape=(1, 9)),
    TensorSpec(name="text_length", dtype="int64", shape=(1,)),
    TensorSpec(name="noise", dtype="float32", shape=(1, 5, 7)),
)
OUTPUTS = (
    TensorSpec(name="samples", dtype="float32", shape=(1, 5, 7)),
    TensorSpec(name="projected", dtype="float32", shape=(1, 4, 8)),
)


def record(name: str) -> FileRecord:
    return FileRecord(name=name, sha256="0" * 64, size=1)


MANIFEST = Manifest(
    created_by="0.0.0",
    parts=(Part(name="policy", model=record("model.onnx"), data=(), inputs=INPUTS, outputs=OUTPUTS),),
    engine=None,
    precision="float32",
    tokenizer=record("tokenizer.json"),
    report=record("report.json"),
    cases=record("cases.npz"),
    inputs=INPUTS,
    outputs=OUTPUTS,
    config=CompileConfig.dense(text_tokens=9, ddim_steps=2),
    plan=Plan(decisions=(LayerDecision(keep=(0, 2)),)),
    statistics={"toy": ActionStatistics(low=(-1.0,) * 7, high=(1.0,) * 7)},
    vocabulary=64,
    pad_id=3,
    opset=23,
    versions={},
)


def make_case() -> RecordedCase:
    draw = np.random.Generator(np.random.PCG64(0))
    return RecordedCase(
        inputs=GraphInputs(
            image=draw.integers(0, 256, (1, 28, 28, 3), dtype=np.uint8),
            input_ids=draw.integers(1, 64, (1, 9)),
            text_length=np.array([7]),
            noise=draw.standard_normal((1, 5, 7), dtype=np.float32),
        ),
        outputs={
            "samples": draw.standard_normal((1, 5, 7), dtype=np.float32),
            "projected": np.asfortranarray(draw.standard_normal((1, 4, 8), dtype=np.float32)),
        },
        stages={
            name: draw.standard_normal(11, dtype=np.float32)
            for name in ("patches", "layers.0", "layers.2", "cognition", "denoising.0")
        },
    )


def arrays_of(case: RecordedCase, kind: str) -> Mapping[str, NDArray[Any]]:
    return case.inputs.by_name if kind == "inputs" else getattr(case, kind)


def test_cases_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    cases = [make_case(), make_case()]
    write_cases(cases, tmp_path / "cases.npz")
    found = read_cases(tmp_path / "cases.npz", MANIFEST)
    assert len(found) == 2
    for read, written in zip(found, cases, strict=True):
        for kind in ("inputs", "outputs", "stages"):
            expected, arrays = arrays_of(written, kind), arrays_of(read, kind)
            assert arrays.keys() == expected.keys()
            for name, array in arrays.items():
                assert array.dtype == expected[name].dtype
                np.testing.assert_array_equal(array, expected[name])


def test_every_export_records_the_stages_of_its_plan_and_sampler() -> None:
    assert recorded_stages(MANIFEST) == (
        *("patches", "projected", "layers.0", "layers.2", "cognition", "denoising.0", "samples"),
    )


def test_a_probe_spreads_over_the_text_rows() -> None:
    value = np.arange(2 * 20 * 300, dtype=np.float32).reshape(2, 20, 300)
    assert np.array_equal(probe("layers.3", value, 9), value[:, -8:].reshape(-1)[::3])
    assert np.array_equal(probe("cognition", value, 9), value.reshape(-1)[::3])


Arrays: TypeAlias = Mapping[str, NDArray[Any]]
"""Arrays in a file of one case, by key."""


def put(kind: str, name: str, array: NDArray[Any]) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {**arrays, f"0/{kind}/{name}": array}


def drop(prefix: str) -> Callable[[Arrays], Arrays]:
    return lambda arrays: {key: array for key, array in arrays.items() if not key.startswith(f"0/{prefix}")}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            drop("inputs/noise"),
            r"case 0 has the inputs \['image', 'input_ids', 'text_length'\]: expected",
        ),
        (drop("outputs/samples"), r"case 0 has the outputs \['projected'\]: expected samples float32"),
        (drop("stages/layers.2"), r"case 0 lacks layers\.2, so it would not prove every stage"),
        (drop("stages"), "case 0 lacks cognition, denoising.0, layers.0, layers.2, patches"),
        (put("inputs", "depth", np.zeros(3, np.float32)), "case 0 has the inputs"),
        (
            put("inputs", "noise", np.zeros((1, 5, 7))),
            r"noise\.npy .*'<f8'.*: expected noise float32\[1, 5, 7\]",
        ),
        (
            put("inputs", "noise", np.zeros((5, 7), np.float32)),
            r"noise\.npy .*\(5, 7\).*: expected noise float32\[1, 5, 7",
        ),
        (
            put("inputs", "noise", np.full((1, 5, 7), np.nan, np.float32)),
            "35 of 35 values of noise are infinite",
        ),
        (put("inputs", "input_ids", np.full((1, 9), -1)), "input_ids has ids from -1 to -1: expected from 0 to 63"),
        (put("inputs", "input_ids", np.full((1, 9), 64)), "input_ids has ids from 64 to 64: expected from 0 to 63"),
        (put("inputs", "text_length", np.array([1])), r"text_length=\[1\]: expected from 2 to 9"),
        (put("inputs", "text_length", np.array([10])), r"text_length=\[10\]: expected from 2 to 9"),
        (put("outputs", "samples", np.zeros((1, 5, 7), np.int64)), r"samples\.npy .*'<i8'.*: expected samples float32"),
        (put("outputs", "samples", np.full((1, 5, 7), np.inf, np.float32)), "35 of 35 values of samples are infinite"),
        (put("stages", "patches", np.zeros(0, np.float32)), r"patches\.npy .*\(0,\).*: expected float32\[N\]"),
        (put("stages", "patches", np.zeros(4097, np.float32)), r"patches\.npy .*\(4097,\).*: expected float32\[N\]"),
        (put("stages", "patches", np.zeros((2, 2), np.float32)), r"patches\.npy .*\(2, 2\).*: expected float32\[N\]"),
        (put("stages", "patches", np.zeros(3)), r"patches\.npy .*'<f8'.*: expected float32\[N\]"),
        (
            put("stages", "layers.0", np.array([1, np.nan], np.float32)),
            r"1 of 2 values of layers\.0 are",
        ),
    ],
)
def test_a_case_of_another_form_or_range_is_refused(
    change: Callable[[Arrays], Arrays], message: str, tmp_path: Path
) -> None:
    write_cases([make_case()], tmp_path / "cases.npz")
    with np.load(tmp_path / "cases.npz") as archive:
        arrays = dict(archive)
    np.savez_compressed(tmp_path / "cases.npz", allow_pickle=False, **change(arrays))
    with pytest.raises(ArtifactError, match=f"recorded cases .*{message}.*compile the policy again"):
        read_cases(tmp_path / "cases.npz", MANIFEST)


def npy(array: NDArray[Any]) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def header(shape: str) -> bytes:
    text = f"{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}".ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text.encode("latin1")


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04", npy(np.zeros(3))])
def test_a_file_that_is_no_archive_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "cases.npz").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"recorded cases .*: File is not a zip file"):
        read_cases(tmp_path / "cases.npz", MANIFEST)


def test_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"recorded cases .*No such file"):
        read_cases(tmp_path / "cases.npz", MANIFEST)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("0/stages/patches.npy", npy(np.array([{}], dtype=object)), "has the header .*O.*: expected float32"),
        ("0/stages/patches.npy", header("(1000000000000,)"), r"\(1000000000000,\).*: expected float32\[N\]"),
        ("0/stages/patches.npy", header("(4000,)"), "has not the 16000 bytes of its header"),
        ("0/stages/patches.npy", header("(1,)") + bytes(5), "has not the 4 bytes of its header"),
        ("0/stages/patches.npy", b"no array", "is no array in numpy's format 1.0"),
        ("0/stages/patches.npy", header("(" * 200), "has the header"),
        ("0/inputs/../noise.npy", b"", "it holds '0/inputs/../noise.npy'"),
        ("0/weights/noise.npy", b"", "it holds '0/weights/noise.npy'"),
        ("\u0663/inputs/noise.npy", b"", "it holds '\u0663/inputs/noise.npy'"),
        ("64/inputs/noise.npy", b"", "it holds '64/inputs/noise.npy'"),
        ("noise", b"", "it holds 'noise'"),
    ],
)
def test_an_entry_that_no_export_writes_is_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cases.npz", "w") as archive:
        archive.writestr(name, content)
    with pytest.raises(ArtifactError, match=f"recorded cases .*{message}"):
        read_cases(tmp_path / "cases.npz", MANIFEST)


@pytest.mark.parametrize("numbers", [(), (1,), (0, 2)])
def test_cases_that_are_not_counted_from_0_on_are_refused(numbers: tuple[int, ...], tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cases.npz", "w") as archive:
        for number in numbers:
            archive.writestr(f"{number}/stages/patches.npy", npy(np.zeros(3, np.float32)))
    with pytest.raises(ArtifactError, match=r"it holds the cases \[.*\], expected them from 0 on"):
        read_cases(tmp_path / "cases.npz", MANIFEST)


def test_an_array_that_a_manifest_makes_huge_is_refused_before_it_is_read(tmp_path: Path) -> None:
    shape = (1, 10**6, 10**6)
    spec = TensorSpec(name="heat", dtype="float32", shape=shape)
    outputs = (*OUTPUTS, spec)
    parts = (replace(MANIFEST.parts[0], outputs=outputs),)
    with zipfile.ZipFile(tmp_path / "cases.npz", "w") as archive:
        archive.writestr("0/outputs/heat.npy", header(str(shape)))
    with pytest.raises(ArtifactError, match=r"heat\.npy would have 4000000000000 bytes: expected at most 1073741824"):
        read_cases(tmp_path / "cases.npz", replace(MANIFEST, parts=parts, outputs=outputs))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (6, 1, "is encrypted or compressed by a method other than deflate"),  # general purpose flags
        (8, 14, "is encrypted or compressed by a method other than deflate"),  # LZMA
        (8, 99, "is encrypted or compressed by a method other than deflate"),
    ],
)
def test_an_entry_that_cannot_be_unpacked_is_refused(field: int, value: int, message: str, tmp_path: Path) -> None:
    write_cases([make_case()], tmp_path / "cases.npz")
    data = bytearray((tmp_path / "cases.npz").read_bytes())
    entry = data.index(b"PK\x01\x02")  # the first one of the directory, whose fields stand 2 bytes further on
    data[entry + field + 2 : entry + field + 4] = struct.pack("<H", value)
    (tmp_path / "cases.npz").write_bytes(data)
    with pytest.raises(ArtifactError, match=message):
        read_cases(tmp_path / "cases.npz", MANIFEST)


def test_a_damaged_stream_is_refused_wherever_it_is_damaged(tmp_path: Path) -> None:
    write_cases([make_case()], tmp_path / "cases.npz")
    data = (tmp_path / "cases.npz").read_bytes()
    draw = np.random.Generator(np.random.PCG64(1))
    refused = 0
    for place in draw.integers(0, len(data), 300):
        changed = bytearray(data)
        changed[place] ^= 0x55
        (tmp_path / "cases.npz").write_bytes(changed)
        try:
            read_cases(tmp_path / "cases.npz", MANIFEST)
        except ArtifactError:
            refused += 1
    assert refused > 250  # a date or an attribute may be any


def test_an_entry_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "cases.npz", "w") as archive:
        archive.writestr("0/stages/patches.npy", npy(np.zeros(3, np.float32)))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("0/stages/patches.npy", npy(np.zeros(3, np.float32)))
    with pytest.raises(ArtifactError, match=r"it holds 0/stages/patches\.npy twice"):
        read_cases(tmp_path / "cases.npz", MANIFEST)
