"""What memory is free, and what a piece of work took."""

import gc
import mmap
from pathlib import Path
from time import monotonic, sleep

import pytest

from evla_compile import memory
from evla_compile.memory import available_memory, watching_memory

SIZE = 100_000_000


def test_some_memory_is_available() -> None:
    found = available_memory()
    assert found is not None
    assert 100_000_000 < found < 1 << 50


def test_the_peak_is_that_of_the_block() -> None:
    gc.collect()  # what other tests left must not be freed meanwhile
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    with watching_memory() as before:
        pass
    # A mapping of its own: a bytearray may lie in what the allocator holds free, and then takes nothing more.
    with watching_memory() as peak, mmap.mmap(-1, SIZE, flags=private) as block:
        block.write(b"x" * SIZE)
        deadline = monotonic() + 30  # a loaded machine may starve the watching thread for longer than its period
        while peak.private - before.private <= 0.8 * SIZE and monotonic() < deadline:
            sleep(0.02)
    assert before.private > 0
    assert peak.private - before.private > 0.8 * SIZE
    assert peak.resident >= peak.private


def test_pages_of_mapped_files_are_not_private(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * SIZE)
    with watching_memory() as before:
        pass
    with (
        (tmp_path / "file").open("rb") as file,
        mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped,
        watching_memory() as peak,
    ):
        assert sum(mapped[:: mmap.PAGESIZE]) > 0
    assert peak.resident - before.resident > 0.8 * SIZE
    assert peak.private - before.private < 0.2 * SIZE


def test_a_system_that_does_not_tell_gives_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "_MEMINFO", tmp_path / "absent")
    assert available_memory() is None
