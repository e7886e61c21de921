"""Scratch folders: who owns one, what becomes of those left behind, and files that appear whole or not at all."""

import logging
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from evla_compile import cli
from evla_compile.scratch import JOURNAL, exiting_on_sigterm, remove_stale, replacing, scratch


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def leave_behind(place: Path) -> Path:
    """Make what a process leaves that was killed: a folder whose lock nobody has."""
    folder = place.with_name(f".{place.name}.partial-0123abcd")
    folder.mkdir()
    (folder / "lock").touch()
    (folder / "new").mkdir()
    (folder / "new" / "model.onnx").write_bytes(bytes(1_500_000))
    return folder


def test_what_a_dead_process_left_is_removed_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = leave_behind(tmp_path / "policy")
    leave_behind(tmp_path / "other")
    (tmp_path / ".policy.partial-of-mine").mkdir()
    with caplog.at_level(logging.WARNING):
        remove_stale(tmp_path / "policy")
    assert names(tmp_path) == [".other.partial-0123abcd", ".policy.partial-of-mine"]
    assert [record.getMessage() for record in caplog.records] == [
        f"removed {folder} (1.5 MB), left by a process that was killed"
    ]


def test_one_that_was_killed_before_it_took_its_lock_is_removed_too(tmp_path: Path) -> None:
    (tmp_path / ".policy.partial-01").mkdir()
    remove_stale(tmp_path / "policy")
    assert names(tmp_path) == []


def test_that_of_a_living_process_stays(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from evla_compile.scratch import scratch\n"
        "with scratch(Path(sys.argv[1])):\n    print('ready', flush=True); sys.stdin.read()"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "policy"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        before = names(tmp_path)
        remove_stale(tmp_path / "policy")
        assert names(tmp_path) == before
        assert len(before) == 1
        other.kill()
        other.wait()
        remove_stale(tmp_path / "policy")
        assert names(tmp_path) == []


def test_one_within_the_same_process_stays(tmp_path: Path) -> None:
    with scratch(tmp_path / "policy") as folder:
        remove_stale(tmp_path / "policy")
        assert folder.is_dir()
        with scratch(tmp_path / "policy") as second:
            assert second != folder
    assert names(tmp_path) == []


def test_a_journal_keeps_a_folder_until_its_move_is_finished(tmp_path: Path) -> None:
    folder = leave_behind(tmp_path / "policy")
    (folder / JOURNAL).touch()
    remove_stale(tmp_path / "policy")
    assert folder.is_dir()
    finished: list[Path] = []
    remove_stale(tmp_path / "policy", finished.append)
    assert finished == [folder]
    assert not folder.exists()


def test_a_file_system_without_locks_can_be_written_and_nothing_is_taken_for_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", refuse)
    folder = leave_behind(tmp_path / "plan.json")
    with replacing(tmp_path / "plan.json") as new:
        new.write_text("plan", encoding="utf-8")
    assert names(tmp_path) == [folder.name, "plan.json"]
    assert f"{folder} may be left from a process that was killed, and cannot be examined" in caplog.text


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("old", encoding="utf-8")

    def write_half() -> None:
        with replacing(tmp_path / "plan.json") as new:
            new.write_text("ha", encoding="utf-8")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_half()
    assert names(tmp_path) == ["plan.json"]
    assert (tmp_path / "plan.json").read_text(encoding="utf-8") == "old"


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "plan.json").write_text("old", encoding="utf-8")
    (tmp_path / "plan.json").symlink_to(tmp_path / "elsewhere" / "plan.json")
    with replacing(tmp_path / "plan.json") as new:
        new.write_text("new", encoding="utf-8")
    assert (tmp_path / "elsewhere" / "plan.json").read_text(encoding="utf-8") == "new"
    assert (tmp_path / "plan.json").is_symlink()


SLEEPER = """
import sys, time
from pathlib import Path
from evla_compile.scratch import scratch
with scratch(Path(sys.argv[1])) as folder:
    (folder / "half").write_text("of it")
    print("ready", flush=True)
    time.sleep(60)
"""


def test_sigterm_cleans_up_as_sigint_does(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", SLEEPER, tmp_path / "policy"], stdout=subprocess.PIPE, text=True)
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert len(names(tmp_path)) == 1
        process.terminate()
        assert process.wait() == 128 + signal.SIGTERM
    assert names(tmp_path) == []


def test_the_command_line_cleans_up_on_sigterm(monkeypatch: pytest.MonkeyPatch) -> None:
    cleaned = []

    def command(prog_name: str) -> None:
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            cleaned.append(prog_name)

    monkeypatch.setattr(cli, "app", command)
    with pytest.raises(SystemExit, match=r"^143$"):
        cli.main()
    assert cleaned == ["evla"]


def test_a_program_s_own_handler_of_sigterm_stays() -> None:
    received = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with exiting_on_sigterm():
            os.kill(os.getpid(), signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, former)
    assert received == [signal.SIGTERM]


def test_the_handler_goes_with_the_block_and_other_threads_need_none(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGTERM)
    failures: list[BaseException] = []

    def work() -> None:
        try:
            with scratch(tmp_path / "policy"):
                assert signal.getsignal(signal.SIGTERM) is before
        except BaseException as error:  # noqa: BLE001 - carried to the test's own thread
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures
    with exiting_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_is_no_regular_file_is_not_replaced(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match=r"pipe is no regular file"), replacing(tmp_path / "pipe"):
        raise AssertionError("nothing is written")
    assert (tmp_path / "pipe").is_fifo()
