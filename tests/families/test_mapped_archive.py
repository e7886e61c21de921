"""Archives of torch.save, whoever wrote the zip around them, against what torch.load reads."""

import io
import mmap
import struct
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.serialization import config

from evla_compile.errors import CheckpointError
from evla_compile.families.cogact.loading import mapped_archive
from evla_compile.families.cogact.loading.mapped_archive import read_archive

Member = tuple[str, bytes]
WEIGHT = "archive/data/0"


@pytest.fixture
def tensors() -> dict[str, Any]:
    """Tensors of several dtypes and forms; the first two share a storage, as tied weights do."""
    torch.manual_seed(0)
    tied = torch.randn(5, 3)
    return {
        "tied": tied,
        "again": tied[1:, ::2].T,
        "half": torch.randn(7).to(torch.bfloat16),
        "double": torch.randn(2, 2, dtype=torch.float64),
        "bytes": torch.arange(5, dtype=torch.uint8),
        "empty": torch.empty(0, 4),
        "parameter": nn.Parameter(torch.randn(3)),
        "group": {"inner": torch.randn(9, 11)},
        "step": 7,
    }


@pytest.fixture
def members(tensors: dict[str, Any]) -> list[Member]:
    """What torch.save puts into its zip, in its order, by name."""
    stream = io.BytesIO()
    torch.save(tensors, stream)
    with zipfile.ZipFile(stream) as archive:
        return [(info.filename, archive.read(info)) for info in archive.infolist()]


def pack(file: Path, members: Sequence[Member], *, extra: int = 0, zip64: bool = False, method: int = 0) -> Path:
    """Write members with Python's `zipfile`, which aligns nothing, in the order given."""
    with zipfile.ZipFile(file, "w", method) as archive:
        for number, (name, contents) in enumerate(members):
            info = zipfile.ZipInfo(name)
            info.compress_type = method
            info.extra = struct.pack("<HH", 0xCAFE, extra + number) + bytes(extra + number) if extra else b""
            with archive.open(info, "w", force_zip64=zip64) as stream:
                stream.write(contents)
    return file


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
        assert not found.numel() or found.data_ptr() % found.element_size() == 0
    else:
        assert found == expected


REPACKED: dict[str, Callable[[Path, list[Member]], Path]] = {
    "in torch's order": pack,
    "reordered": lambda file, members: pack(file, members[::-1]),
    "with extra fields": lambda file, members: pack(file, members, extra=5),
    "zip64": lambda file, members: pack(file, members, zip64=True),
    "without a format version": lambda file, members: pack(
        file, [member for member in members if not member[0].endswith((".format_version", ".storage_alignment"))]
    ),
}


@pytest.mark.parametrize("way", REPACKED)
def test_every_tensor_of_a_repacked_archive_is_the_one_that_torch_reads(
    tmp_path: Path, tensors: dict[str, Any], members: list[Member], way: str
) -> None:
    assert any(name == "archive/.format_version" for name, _ in members)
    file = REPACKED[way](tmp_path / "a.pt", members)
    assert_same(torch.load(file), tensors)
    assert_same(read_archive(file), tensors)


@pytest.mark.parametrize("alignment", [1, 64, 4096])
def test_every_tensor_of_an_archive_of_torch_is_read(tmp_path: Path, tensors: dict[str, Any], alignment: int) -> None:
    with config.patch("save.storage_alignment", alignment):  # type: ignore[attr-defined]  # given to it at import
        torch.save(tensors, tmp_path / "a.pt")
    assert_same(read_archive(tmp_path / "a.pt"), tensors)


def test_the_programs_default_device_and_dtype_do_not_reach_what_is_read(
    tmp_path: Path, tensors: dict[str, Any], members: list[Member]
) -> None:
    file, dtype = pack(tmp_path / "a.pt", members), torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            found = read_archive(file)
    finally:
        torch.set_default_dtype(dtype)
    assert_same(found, tensors)


def test_a_system_that_sets_memory_aside_for_mappings_is_reported(
    tmp_path: Path, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    file = pack(tmp_path / "a.pt", members)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(CheckpointError, match=r"kB cannot be mapped .*Cannot allocate.*overcommit_memory"):
        read_archive(file)


def test_tied_tensors_stay_tied(tmp_path: Path, members: list[Member]) -> None:
    found = read_archive(pack(tmp_path / "a.pt", members))
    assert found["tied"].untyped_storage().data_ptr() == found["again"].untyped_storage().data_ptr()


def test_a_tensor_that_is_not_aligned_is_copied_only_where_memory_allows(
    tmp_path: Path, members: list[Member], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = pack(tmp_path / "a.pt", members)
    monkeypatch.setattr(mapped_archive, "available_memory", lambda: 10)
    with pytest.raises(CheckpointError, match=r"archive/data/\d+ is not aligned.*torch\.save"):
        read_archive(file)


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_compressed_member_is_refused_by_name(tmp_path: Path, members: list[Member], method: int) -> None:
    file = pack(tmp_path / "a.pt", members)
    stored = [member for member in members if member[0] != WEIGHT]
    pack(file, stored)
    with zipfile.ZipFile(file, "a", method) as archive:
        archive.writestr(WEIGHT, dict(members)[WEIGHT])
    with pytest.raises(CheckpointError, match=rf"{WEIGHT} is compressed.*torch\.save"):
        read_archive(file)


def changed(members: list[Member], name: str, contents: bytes | None) -> list[Member]:
    """Return the members with the contents of one replaced, or without it."""
    rest = [member for member in members if member[0] != name]
    return rest if contents is None else [*rest, (name, contents)]


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        (WEIGHT, None, rf"holds no member {WEIGHT}"),
        (WEIGHT, bytes(59), rf"{WEIGHT} holds 59 bytes, and a tensor in it claims 60"),
        ("archive/byteorder", b"big", r"archive/byteorder says 'big'"),
        ("archive/data.pkl", None, r"no data\.pkl"),
        ("archive/constants.pkl", b"", "TorchScript"),
        ("other/data.pkl", b"", r"data\.pkl"),
    ],
)
def test_an_archive_of_another_form_is_refused(
    tmp_path: Path, members: list[Member], name: str, contents: bytes | None, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read_archive(pack(tmp_path / "a.pt", changed(members, name, contents)))


@pytest.mark.parametrize("count", [0, 1])
@pytest.mark.parametrize("extra", [0, 5, 6, 7, 8])  # from one place to another, mapped or copied
def test_a_tensor_that_reaches_beyond_its_storage_is_refused(tmp_path: Path, count: int, extra: int) -> None:
    stream = io.BytesIO()
    torch.save({"weight": torch.ones(5, 3)}, stream)
    with zipfile.ZipFile(stream) as archive:
        forged = {name: archive.read(name) for name in archive.namelist()}
    length = b"K\x0ft"  # 15 numbers, the end of the storage's identity
    assert forged["archive/data.pkl"].count(length) == 1
    forged["archive/data.pkl"] = forged["archive/data.pkl"].replace(length, b"K" + bytes([count]) + b"t")
    forged[WEIGHT] = bytes(4 * count)
    file = pack(tmp_path / "a.pt", list(forged.items()), extra=extra)
    with pytest.raises(RuntimeError):
        torch.load(file)
    with pytest.raises(CheckpointError, match="not resizable"):
        read_archive(file)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_two_members_of_one_name_are_refused(tmp_path: Path, members: list[Member]) -> None:
    with pytest.raises(CheckpointError, match=rf"several members {WEIGHT}"):
        read_archive(pack(tmp_path / "a.pt", [*members, (WEIGHT, bytes(60))]))


@pytest.mark.parametrize("place", [0, 32])  # the signature, and the name
def test_a_local_header_that_is_not_the_members_own_is_refused(
    tmp_path: Path, members: list[Member], place: int
) -> None:
    file = pack(tmp_path / "a.pt", members)
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(WEIGHT).header_offset
    contents = bytearray(file.read_bytes())
    contents[start + place] ^= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"the header of {WEIGHT}"):
        read_archive(file)


def test_an_encrypted_member_is_refused_by_name(tmp_path: Path, members: list[Member]) -> None:
    file = pack(tmp_path / "a.pt", members)
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo(WEIGHT).header_offset
    contents = bytearray(file.read_bytes())
    contents[start + 6] |= 1
    central = contents.rindex(WEIGHT.encode()) - 46
    contents[central + 8] |= 1
    file.write_bytes(contents)
    with pytest.raises(CheckpointError, match=rf"{WEIGHT} is encrypted"):
        read_archive(file)


def test_every_cut_of_an_archive_is_refused(tmp_path: Path, members: list[Member]) -> None:
    file = pack(tmp_path / "a.pt", members)
    whole = file.read_bytes()
    for size in range(2, len(whole), 97):
        file.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="truncated or damaged"):
            read_archive(file)
